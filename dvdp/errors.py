"""The one exception for what a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from dvdp.text import printable


class UserError(ValueError):
    """A mistake in what we were given. Its text is one sentence: what, found, expected, what to do.

    Command-line tools print it without a traceback. What has no printed form, as in names of files, is escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: ``" (did you mean 'floor'?)"``, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
