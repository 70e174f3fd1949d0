"""What the docs say of the code stays true."""

import dataclasses
import re
from pathlib import Path

import pytest

from dvdp.config import Params, SettingParams, read_params

PROJECT = Path(__file__).parents[1]


def test_every_key_of_params_is_documented_with_its_default() -> None:
    documented: dict[str, dict[str, str]] = {}
    section = ""
    for line in (PROJECT / "docs/params.md").read_text().splitlines():
        if match := re.match(r"\| \*\*(\w+)\*\* \|", line):
            section = match[1]
            documented[section] = {}
        elif match := re.match(r"\| `(\w+)` \| (.*?) \|", line):
            documented[section][match[1]] = match[2].strip()
    sections = {entry.name: entry for entry in dataclasses.fields(Params)}
    assert list(documented) == list(sections)
    for name, keys in documented.items():
        if name == "seeds":
            continue
        kind = SettingParams if name == "settings" else type(getattr(Params(), name))
        assert list(keys) == [entry.name for entry in dataclasses.fields(kind)], name
        for entry in dataclasses.fields(kind):
            if entry.default is not dataclasses.MISSING and name != "settings":
                value = list(entry.default) if isinstance(entry.default, tuple) else entry.default
                shown = {None: "null", True: "true", False: "false"}.get(value) if not isinstance(value, list) else None
                assert keys[entry.name] in (shown or str(value), f"{value}"), f"{name}.{entry.name}"


@pytest.mark.parametrize("path", ["params.yaml", *sorted(p.name for p in (PROJECT / "presets").glob("*.yaml"))])
def test_every_params_file_of_the_project_is_valid(path: str) -> None:
    file = PROJECT / path if path == "params.yaml" else PROJECT / "presets" / path
    assert read_params(file).runs()


def test_links_between_documents_lead_somewhere() -> None:
    for document in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"), *(PROJECT / "presets").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
