"""Files that the package brings along: models, prompts, profiles, settings.

They lie in `flowspec/data` and are named `models/...` and `config/...`. A file or folder of the
same name in the working folder takes precedence, so that users can replace any of them.
"""

from importlib.resources import files
from pathlib import Path

DATA = Path(str(files("flowspec"))) / "data"
DEMO = DATA / "models" / "demo"  # the package's own demo, even if the working folder has one


def find_bundled(name: str | Path) -> Path:
    """Return the path `name` if it exists, else the package's own file or folder of this name."""
    path = Path(name)
    is_name = path.parts[:1] in (("config",), ("models",)) and ".." not in path.parts
    own = DATA / path
    return own if is_name and not path.exists() and own.exists() else path
