"""What reaches the terminal. Text from files, models and clients may hold escape sequences, which a terminal obeys."""

from __future__ import annotations

import logging
import re
from typing import Any

from rich.console import Console as RichConsole
from rich.text import Text

# control characters but tab and newline (\r goes back over what is written); what reorders a line; line ends that are none; halves of a
# pair, which no encoding takes
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with what a terminal would obey shown, as ``\\x1b``. Character by character, so pieces need not be whole."""
    return _ODD.sub(lambda found: _shown(found[0]), text.replace("\r\n", "\n"))


def line(text: str) -> str:
    """The same, and on one line."""
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def _shown(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class Console(RichConsole):
    """rich's, for text from outside: every string that is printed, also in a table, is ``plain``. Styles are rich's own."""

    def render_str(self, text: str, **kwargs: Any) -> Text:  # type: ignore[override]
        return super().render_str(plain(text), **kwargs)


class _Plain(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_text = record.exc_text and plain(record.exc_text)
        return True


PLAIN = _Plain()  # for handlers that write to a terminal: messages quote what clients and files say
