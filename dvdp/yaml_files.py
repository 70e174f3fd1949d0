"""YAML as DVC reads it: YAML 1.2, by the same library. What is neither plain data nor short is refused."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode, Node, ScalarNode
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError

from dvdp.errors import UserError

#: Characters of a file, at most; a whole params.yaml has some 5,000.
MOST_CHARACTERS = 1 << 16
#: The same once every alias (``*name``) stands for what it names, and how deep values may lie in each other.
_MOST_EXPANDED, _MOST_DEPTH = 4 * MOST_CHARACTERS, 20
_MOST_DIGITS = 40
_PLAIN = {
    f"tag:yaml.org,2002:{name}"
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
}  # fmt: skip


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        UserError: it is longer than :data:`MOST_CHARACTERS`, or see :func:`parse_yaml`.
    """
    with path.open(encoding="utf-8") as file:
        try:
            text = file.read(MOST_CHARACTERS + 1)
        except UnicodeDecodeError as error:
            raise UserError(f"'{path}' is no YAML: {error}") from None
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"'{path}' has more than {MOST_CHARACTERS:,} characters, expected a file of a few thousand")
    try:
        return parse_yaml(text)
    except UserError as error:
        raise UserError(f"'{path}' is no YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text: mappings, lists, text, numbers, booleans, dates and None.

    Raises:
        UserError: it is no YAML, or says what plain data cannot: a key twice, other tags, an alias within itself, more
            than can be borne once aliases are expanded.
    """
    if re.search("^%YAML", text, re.MULTILINE):
        raise UserError("found a line that begins with %YAML, expected none, as DVC reads every file as YAML 1.2")
    # In Python, as the parser in C ends the process where values lie deep in each other.
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _PlainConstructor
    try:
        return yaml.load(text)
    except UserError:
        raise
    except RecursionError:
        raise _too_deep() from None
    except DuplicateKeyError as error:
        key = re.search('duplicate key "(.*?)"', str(error.problem), re.DOTALL)
        raise UserError(f"key {key[1] if key else ''!r} is given twice{_place(error)}") from None
    except MarkedYAMLError as error:
        told = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{_short(told)}{_place(error)}") from None
    except Exception as error:  # The library's constructors raise whatever they trip over, such as KeyError.
        raise UserError(_short(f"{type(error).__name__}, {error}")) from None


def dump_yaml(tree: Any) -> str:
    """Plain data as YAML text that :func:`parse_yaml` and DVC read alike."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


class _PlainConstructor(SafeConstructor):
    """Looks at a document before anything is made of it."""

    def construct_document(self, node: Node) -> Any:
        _expanded(node, {}, 0)
        return super().construct_document(node)


def _expanded(node: Node, known: dict[int, int], depth: int) -> int:
    """Characters and values of a node, where every alias counts as what it stands for."""
    if depth > _MOST_DEPTH:
        raise _too_deep()
    if node.tag not in _PLAIN:
        raise UserError(f"found the tag {_short(str(node.tag))}, expected plain data")
    if isinstance(node, ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
            raise UserError(f"found a number of {len(node.value):,} digits, expected {_MOST_DIGITS} at most")
        return 1 + len(node.value)
    if id(node) not in known:
        parts = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        known[id(node)] = 1 + sum(_expanded(part, known, depth + 1) for part in parts)
        if known[id(node)] > _MOST_EXPANDED:
            raise UserError(f"its aliases stand for more than {_MOST_EXPANDED:,} characters, expected a few thousand")
    return known[id(node)]


def _too_deep() -> UserError:
    return UserError(f"its values lie deeper in each other than {_MOST_DEPTH} times, expected fewer")


def _place(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" in line {mark.line + 1}" if mark else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."
