"""Where a run goes to when DVC runs an experiment in a copy of the project."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.provenance import DVC_EXPERIMENT, keep_in_project, provenance


def test_what_an_experiment_makes_in_a_copy_of_the_project_lies_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "x"
    (copy / "there").mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(copy)
    for _ in range(2):
        keep_in_project("deep/runs", "mlflow.db", "there", tmp_path / "else")
    Path("deep/runs/weights").write_text("trained")
    Path("mlflow.db").write_text("tracked")
    Path("there/file").write_text("of the copy")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(copy)
    assert Path("deep/runs/weights").read_text() == "trained"
    assert Path("mlflow.db").read_text() == "tracked"
    assert not Path("there").exists()
    assert not Path("else").exists()


def test_in_the_project_itself_nothing_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in (None, tmp_path, "/elsewhere"):
        if root is not None:
            monkeypatch.setenv("DVC_ROOT", str(root))
        keep_in_project("runs")
        assert not list(tmp_path.iterdir())


def test_a_run_carries_the_name_of_its_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "earlier")
    assert provenance(tmp_path) == {DVC_EXPERIMENT: "earlier"}
