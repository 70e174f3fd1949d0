"""Names from outside become text that can be printed anywhere, and stay apart."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvdp.errors import UserError
from dvdp.text import LABEL, printable, shown, utf8

NAMES = st.text(st.characters(codec=None, exclude_categories=()), max_size=150) | st.binary(max_size=150).map(
    os.fsdecode
)


@pytest.mark.parametrize("name", ["cat", "n01440764", "7", "a b", "été", "猫", "<b>|*$x$", "..", "~", ""])
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert shown(name, LABEL) == printable(name) == utf8(name) == name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("caf\\xe9", r"caf\\xe9"),
        ("a\nb", r"a\u000ab"),
        ("a\u202eb", r"a\u202eb"),
        ("a\u00a0b", r"a\u00a0b"),
        ("\x85", r"\u0085"),
        (os.fsdecode(b"\x85"), r"\x85"),
        ("\U000e0041", r"\U000e0041"),
        (" cat", r"\u0020cat"),
        ("cat ", r"cat\u0020"),
        ("  ", r"\u0020\u0020"),
    ],
)
def test_what_has_no_printed_form_becomes_an_escape(name: str, text: str) -> None:
    assert shown(name, LABEL) == text


def test_a_long_name_keeps_its_start_and_gets_a_digest() -> None:
    one, two = (shown("\n" * 40 + "x" * 5000 + end, LABEL) for end in "ab")
    assert one != two
    assert len(one) <= LABEL
    assert one.startswith(r"\u000a\u000a")
    # The cut falls between escapes, and a name that is written like a cut one is another.
    assert shown(one, LABEL) != one


@given(NAMES, NAMES)
def test_names_are_one_printable_line_of_bounded_length_and_stay_apart(one: str, two: str) -> None:
    texts = [shown(name, 40) for name in (one, two)]
    assert all(text.isprintable() and len(text) <= 40 and text.strip() == text for text in texts)
    assert (texts[0] == texts[1]) == (one == two)
    "".join(texts).encode()
    assert printable(printable(one)) == printable(one)
    utf8(one).encode()


def test_every_sentence_to_a_user_is_one_printable_line() -> None:
    error = UserError(f"dataset.path: found nothing at '{os.fsdecode(b'caf' + bytes([0xE9, 10]))}\u202e'.")
    assert str(error) == r"dataset.path: found nothing at 'caf\xe9\u000a\u202e'."
    assert str(UserError(str(error))) == str(error)
