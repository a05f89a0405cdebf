"""A report may be published: where things lie on the machine stays out of it."""

from __future__ import annotations

import re

_PART = r"(?:[^/\\,;:'\"()<>\n.]|\.(?!\s))"
"""A letter of a folder's name, spaces among them; a sentence's end isn't one."""
# A slash behind a word, a bracket or a per cent sign divides: exp(entropy)/V.
_PATH = re.compile(
    r"(?<![\w.~/\\)\]}%])(?:[A-Za-z][\w+.-]+:(?=//)|[A-Za-z]:|~)?"
    rf"[/\\]+(?=\S)(?:{_PART}+[/\\]+)*([^\s/\\,;:'\"()<>]+)"
)


def without_paths(text: str) -> str:
    """Text with absolute paths and addresses cut to their last part.

    A folder's name may hold spaces, so of two paths in a row without punctuation between them only
    the last part of the second is left: rather too short than too much.
    """
    return _PATH.sub(r"\1", text)
