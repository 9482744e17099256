"""Files that come with the package, wherever it is installed: models, prompts, profiles, settings.

They lie in `flowspec/data` and are named `models/...` and `config/...`. A file or folder of that
name in the working folder comes before the package's, so that anybody can put their own in place.
"""

from importlib.resources import files
from pathlib import Path

DATA = Path(str(files("flowspec"))) / "data"
DEMO = DATA / "models" / "demo"  # the package's own, whatever the working folder holds


def find_bundled(name: str | Path) -> Path:
    """The path `name`; where nothing is there, the package's own file or folder of this name."""
    path = Path(name)
    is_name = path.parts[:1] in (("config",), ("models",)) and ".." not in path.parts
    own = DATA / path
    return own if is_name and not path.exists() and own.exists() else path
