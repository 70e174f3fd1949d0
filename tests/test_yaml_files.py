"""params.yaml is read as DVC reads it, and what is written is read back alike by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml, loads_yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdp.config import Params, read_params
from dvdp.errors import UserError
from dvdp.yaml_files import dump_yaml, parse_yaml, read_yaml

PROJECT = next(folder for folder in Path(__file__).parents if (folder / "params.yaml").exists())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("1.0e3", 1000.0),
        ("1e-4", 1e-4),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", 1000),
        ("+1", 1),
        ("1.", 1.0),
        (".5", 0.5),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("null", None),
        ("~", None),
        ("", None),
        ("1,000", "1,000"),
    ],
)
def test_scalars_are_those_of_yaml_1_2_as_dvc_reads_them(text: str, value: Any) -> None:
    (found,) = parse_yaml(f"a: {text}").values()
    assert found == value
    assert type(found) is type(value)
    assert parse_yaml(f"a: {text}") == loads_yaml(f"a: {text}")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1, c: [1, 2]}\nd: {<<: *x, b: 2}\n",
        "\ufeffa: 1\r\nb: 'c'\r\n",
        "a: >-\n  b\n  c\nd: |\n  e\n",
        "# nothing but a comment\n",
        "? a\n: b\n? c\n",
        "a: !!str 1\nb: !!float 1\n",
    ],
)
def test_documents_are_read_as_dvc_reads_them(text: str) -> None:
    assert parse_yaml(text) == loads_yaml(text)


@pytest.mark.parametrize(
    "path", [PROJECT / "params.yaml", *sorted((PROJECT / "presets").glob("*.yaml"))], ids=lambda path: path.stem
)
def test_our_files_are_read_as_dvc_reads_them(path: Path, tmp_path: Path) -> None:
    assert read_yaml(path) == load_yaml(str(path))
    written = dump_yaml(read_params(path).describe())
    assert loads_yaml(written) == parse_yaml(written) == read_params(path).describe()


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]) | st.sampled_from("\n\t\0"), max_size=6)
    | st.sampled_from(["yes", "on", "1e3", "010", "0o10", "1_000", "12:30", "null", "~", "=", "<<", "- a", "a: b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "on", "1"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(tree=plain)
def test_what_is_written_is_read_back_alike_by_us_and_by_dvc(tree: Any) -> None:
    text = dump_yaml({"key": tree})
    assert parse_yaml(text) == {"key": tree}
    assert loads_yaml(text) == {"key": tree}


def test_keys_keep_their_order_and_booleans_are_words() -> None:
    assert dump_yaml({"b": True, "a": None, "c": "true"}) == "b: true\na: null\nc: 'true'\n"
    assert list(parse_yaml(dump_yaml(Params().describe()))) == list(Params().describe())


def test_a_file_that_asks_for_yaml_1_1_is_refused() -> None:
    # The two parsers of DVC's library read it differently.
    with pytest.raises(UserError, match="%YAML"):
        parse_yaml("%YAML 1.1\n---\na: yes\nb: 010\n")


def test_a_file_says_its_name_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(UserError, match=r"a\.yaml' is no YAML: key 'a' is given twice in line 2"):
        read_yaml(tmp_path / "a.yaml")
