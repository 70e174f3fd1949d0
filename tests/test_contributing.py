"""The code that CONTRIBUTING.md shows works as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dvdp import Process, Schedule, sample
from dvdp.config import DatasetParams
from dvdp.data.prepare import prepare
from dvdp.data.sources import SOURCES
from dvdp.diffusion import solvers
from dvdp.diffusion.schedule import ATTENUATIONS
from dvdp.diffusion.solvers import SOLVERS, make_solver
from dvdp.diffusion.timesteps import step_grid

#: What the tests shown are to find imported in the files that they go to.
IMPORTED: dict[str, Any] = {
    "np": np,
    "torch": torch,
    "ATTENUATIONS": ATTENUATIONS,
    "SOURCES": SOURCES,
    "Process": Process,
    "Schedule": Schedule,
    "make_solver": make_solver,
    "step_grid": step_grid,
}

PROJECT = Path(__file__).parents[1]
TEXT = (PROJECT / "CONTRIBUTING.md").read_text()


def section(title: str) -> list[str]:
    """The Python blocks under a heading."""
    (text,) = re.findall(rf"^### {title}\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for block in blocks for line in block.splitlines() if line]) < 30
    return blocks


def added(table: dict[str, Any], line: str, names: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a line into a table of choices for as long as the test lasts; returns its name."""
    ((name, value),) = eval(f"{{{line}}}", dict(names)).items()
    monkeypatch.setitem(table, name, value)
    return str(name)


def shown_test(code: str) -> Callable[[], None]:
    """The test function of a block."""
    names = dict(IMPORTED)
    exec(code, names)
    (name,) = (name for name in names if name.startswith("test_"))
    function: Callable[[], None] = names[name]
    return function


def test_the_solver_shown_works(monkeypatch: pytest.MonkeyPatch) -> None:
    function, line, test = section("A solver")
    names = dict(vars(solvers))
    exec(function, names)
    name = added(SOLVERS, line, names, monkeypatch)
    shown_test(test)()
    process = Process(Schedule.dvdp([300, 600]))
    images = sample(process, lambda x, t: x, (2, 3, 8, 8), steps=10, solver=name)
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()
    monkeypatch.setitem(SOLVERS, name, SOLVERS["deis2"])
    with pytest.raises(AssertionError):
        shown_test(test)()


def test_the_source_shown_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, line, test = section("A data source")
    names: dict[str, Any] = {}
    exec(module, names)
    name = added(SOURCES, line, names, monkeypatch)
    shown_test(test)()
    assert prepare(DatasetParams(source=name, resolution=16), tmp_path / "store").count == 2


def test_the_attenuation_shown_works(monkeypatch: pytest.MonkeyPatch) -> None:
    line, test = section("An attenuation")
    name = added(ATTENUATIONS, line, {}, monkeypatch)
    shown_test(test)()
    Schedule.dvdp([300, 600], attenuation=name)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    file = PROJECT / document
    prose = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


def test_commands_shown_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make ([a-z-]+)", TEXT, re.MULTILINE)) <= targets


def test_hooks_run_what_make_lint_runs_and_fetch_nothing() -> None:
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}
    programs = {hook["entry"].split()[0] for hook in hooks[0]["hooks"]}
    assert {".venv/bin/ruff", ".venv/bin/mypy"} <= programs


def test_continuous_integration_runs_ci_run_on_both_pythons() -> None:
    job = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert job["steps"][-1] == {"run": ".ci/run"}
