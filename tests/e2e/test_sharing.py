"""What a second person gets from a commit and a remote of DVC; experiments on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.support import Project

pytestmark = pytest.mark.slow

METRICS = {"reports/metrics.json", "reports/timings.json"}
IN_GIT = METRICS | {"data/digits/prepare.json"}


@pytest.fixture(scope="module")
def clone(reproduced: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A clone of a project that was run, committed and pushed; the cache of DVC stays behind."""
    folder = tmp_path_factory.mktemp("sharing")
    first = reproduced.copy(folder / "first", training={"images": 1600})
    first.run("dvc", "remote", "add", "--default", "team", str(folder / "remote"))
    first.commit()
    first.run("dvc", "push")
    assert first.run("git", "status", "--porcelain").stdout == ""
    first.run("git", "clone", "--quiet", str(first.folder), str(folder / "second"))
    second = Project(folder / "second")
    second.run("git", "config", "user.name", "test")
    second.run("git", "config", "user.email", "test@localhost")
    yield second
    second.close()


def test_git_has_the_lock_and_the_metrics_and_nothing_else_that_was_made(reproduced: Project) -> None:
    tracked = set(reproduced.run("git", "ls-files").stdout.splitlines())
    assert {path for path in tracked if path.startswith(("data/", "reports/"))} == IN_GIT | {"data/.gitignore"}
    assert "dvc.lock" in tracked
    assert not [path for path in reproduced.folder.glob("[!.]*/**/.gitignore") if path.parent.name != "data"]


def test_a_fresh_clone_shows_and_compares_scores_before_a_pull(clone: Project) -> None:
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert set(shown) == METRICS
    assert set(shown["reports/metrics.json"]["data"]) == {"ddpm", "dvdp-600"}
    changed = json.loads(clone.run("dvc", "metrics", "diff", "--json", "HEAD~2").stdout)
    assert set(changed) == METRICS
    status = json.loads(clone.run("dvc", "status", "--json").stdout)
    assert {"changed outs": {"data/digits/store": "not in cache"}} in status["prepare"], "not: changed"


@pytest.mark.timeout(900)
def test_after_a_pull_nothing_is_left_to_do(clone: Project) -> None:
    # What a scheduled run needs, then the report.
    clone.run("dvc", "pull", "prepare", "extractor", "reference")
    assert (clone.folder / "data" / "digits" / "reference").exists()
    assert not (clone.folder / "reports" / "index.html").exists()
    clone.run("dvc", "pull")
    assert clone.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    printed = clone.run("dvc", "repro").stdout
    assert "Data and pipelines are up to date." in printed
    assert "Running stage" not in printed
    assert not (clone.folder / "runs").exists(), "nothing is trained"
    assert clone.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.timeout(900)
def test_an_experiment_changes_params_from_the_command_line_and_is_kept(clone: Project) -> None:
    clone.run("dvc", "pull", "prepare")
    params = clone.folder / "params.yaml"
    params.write_text("# A comment.\n" + params.read_text())
    clone.commit()

    clone.run("dvc", "exp", "run", "prepare", "--name", "small", "-S", "dataset.resolution=8", "-S", "seeds=[1]")
    written = yaml.safe_load(params.read_text())
    assert written["dataset"]["resolution"] == 8
    assert written["seeds"] == [1]
    assert params.read_text().startswith("# A comment.\n")
    assert json.loads((clone.folder / "data" / "digits" / "prepare.json").read_text())["resolution"] == 8
    assert "small" in clone.run("dvc", "exp", "list").stdout

    clone.run("dvc", "exp", "run", "prepare", "--name", "batch", "-S", "training.batch=8")
    shown = clone.run("dvc", "exp", "diff", "small", "batch", "--json").stdout
    assert json.loads(shown)["params"]["params.yaml"] == {"training.batch": {"old": 16, "new": 8, "diff": -8}}


def test_the_readme_of_data_names_what_is_there(reproduced: Project) -> None:
    text = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    made = {path.name for path in (reproduced.folder / "data" / "digits").iterdir() if not path.name.startswith(".")}
    assert made
    assert all(f"| `{name}" in text for name in made)
