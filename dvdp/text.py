"""Text from outside, such as names of files and classes, made fit to be printed anywhere.

Names of files are bytes: they may hold line breaks, marks that turn the direction of writing, or bytes that are no
UTF-8, which Python keeps as lone surrogates and no file, database or page takes.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from itertools import accumulate

#: Characters of a name that is shown, at most: of a class, and of a file with its folders.
LABEL, FILE = 100, 300
_DIGITS = 16


def printable(text: str) -> str:
    """One line: characters without a printed form of their own become escapes, as in Python's source."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def markdown(text: str) -> str:
    """A line of text for Markdown, where nothing in it is markup."""
    escaped = re.sub(r"[\\|*`\[\]~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))
    # What would begin a heading, or an item of a list.
    escaped = re.sub(r"^(\s*\d*)([#+.)-]+)(?=\s)", r"\1\\\2", escaped)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shown(name: str, most: int) -> str:
    r"""A name as printable text of at most ``most`` characters; different names stay different.

    A plain name stays as it is. A backslash becomes ``\\``, a byte that is no UTF-8 ``\xe9``, another character without
    a printed form, or a space at an end, ``\u000a``. Of a name that is too long the start is kept, then ``\~`` and
    16 digits of its SHA-256.
    """
    inside = range(len(name) - len(name.lstrip(" ")), len(name.rstrip(" ")))
    parts = [c if c.isprintable() and c != "\\" and i in inside else _escape(c) for i, c in enumerate(name)]
    lengths = list(accumulate(map(len, parts)))
    if not parts or lengths[-1] <= most:
        return "".join(parts)
    # Elsewhere a backslash is always followed by one of \, x, u, U, so that no other name is written like this.
    start = "".join(parts[: bisect_right(lengths, most - _DIGITS - 2)])
    return f"{start}\\~{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:_DIGITS]}"


def utf8(text: str) -> str:
    """The text with escapes for what UTF-8 cannot hold; lines stay lines."""
    return text.encode(errors="backslashreplace").decode()


def _escape(character: str) -> str:
    number = ord(character)
    if character == "\\":
        return r"\\"
    if 0xDC80 <= number <= 0xDCFF:  # How Python keeps a byte that is no UTF-8.
        return f"\\x{number - 0xDC00:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
