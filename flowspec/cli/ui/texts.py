"""Text from the command line and standard input, checked without importing torch."""

import sys
from collections.abc import Mapping, Sequence

from flowspec.bench.prompts import decode_file
from flowspec.tokenizer import check_text


def check_texts(options: Mapping[str, Sequence[str] | None]) -> None:
    """Raise ValueError that names the option whose text is not UTF-8."""
    for option, texts in options.items():
        for text in texts or ():
            check_text(text, option)


def read_input() -> str:
    """Read all of standard input as text. Raises ValueError if it is not UTF-8."""
    remedy = "convert it before, such as with `iconv -f LATIN1 -t UTF-8`"
    return decode_file(sys.stdin.buffer.read(), "standard input", remedy=remedy)
