"""`dvc repro`: all of it, nothing of it, and what one changed setting takes; what DVC shows of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.provenance import DVC_EXPERIMENT
from pipelines.tracking.runs import SAMPLING_HASH, TRAINING_HASH
from tests.e2e.support import Project, kill_children
from tests.tracking.support import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def here(reproduced: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project, which the tests below change one after the other."""
    return reproduced.copy(tmp_path_factory.mktemp("changed") / "project", training={"images": 1600})


@pytest.mark.timeout(900)
def test_repro_makes_everything_that_is_declared(reproduced: Project) -> None:
    folder = reproduced.folder
    assert set(json.loads((folder / "reports" / "metrics.json").read_text())) == {"ddpm", "dvdp-600"}
    page = (folder / "reports" / "index.html").read_text()
    assert "2 settings, 1 seed, 16 px images, class-conditional with 10 classes" in page
    assert page.count("data:image/png;base64,") >= 4
    assert all(run.name in page for run in reproduced.runs().values())
    assert "on equal FLOPs" in page
    assert "that was not recorded" not in page, "each worker tells its machine"
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    scored = client.search_runs(["1"], f"tags.`{SAMPLING_HASH}` != ''")
    assert len(scored) == 2
    assert all(f">{run.info.run_id[:8]}<" in page for run in scored)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "readable without a server"
    assert reproduced.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    assert reproduced.run("git", "status", "--porcelain").stdout == "", "all that git sees is committed"
    printed = reproduced.run("dvc", "repro").stdout
    assert "Data and pipelines are up to date" in printed


@pytest.mark.timeout(900)
def test_an_experiment_in_a_copy_trains_one_setting_into_the_project_and_dvc_shows_it(
    here: Project,
) -> None:
    # As a colleague has it, whose MLflow holds what others trained.
    theirs = here.runs()["ddpm"]
    shutil.move(theirs, here.folder / "theirs")
    before = weights(here)
    change = "settings.dvdp-600.turning_points=[500]"
    printed = here.run("dvc", "exp", "run", "--temp", "--name", "earlier", "-S", change).stdout
    for stage in ("prepare", "extractor", "reference"):
        assert f"Stage '{stage}' didn't change, skipping" in printed

    after = weights(here)
    assert {path: time for path, time in after.items() if path in before} == before, "nothing is trained again"
    fetched = theirs / "weights.safetensors"
    (new,) = after.keys() - before.keys() - {fetched}
    assert fetched.read_bytes() == (here.folder / "theirs" / "weights.safetensors").read_bytes()
    assert not (theirs / "ray").exists(), "it is not trained again"
    assert (theirs / "metrics.jsonl").read_bytes() == (here.folder / "theirs" / "metrics.jsonl").read_bytes()
    assert json.loads((new.parent / "run.json").read_text())["run"]["setting"] == "dvdp-600"
    client = MlflowClient(f"sqlite:///{here.folder / 'mlflow.db'}")
    (run,) = client.search_runs(["1"], f"tags.`{TRAINING_HASH}` = '{new.parent.name}'")
    assert (run.data.tags[DVC_EXPERIMENT], run.info.status) == ("earlier", "FINISHED")
    assert not list(here.folder.glob(".dvc/tmp/exps/standalone/tmp*")), "the copy is gone"

    changed = json.loads(here.run("dvc", "exp", "diff", "HEAD", "earlier", "--json").stdout)["metrics"]
    names = {name for file in changed.values() for name in file}
    assert any(name.startswith("dvdp-600.fd_labels") for name in names), names
    assert not any(name.startswith("ddpm.fd_labels") for name in names), names


@pytest.mark.timeout(900)
def test_a_queued_experiment_samples_what_is_trained_and_leaves_its_scores_in_the_project(here: Project) -> None:
    before, client = weights(here), MlflowClient(f"sqlite:///{here.folder / 'mlflow.db'}")
    here.run("dvc", "exp", "run", "--queue", "--name", "queued", "-S", "sampling.steps=4")
    here.run("dvc", "queue", "start")
    try:
        wait_until(lambda: {"Success", "Failed"} & set(here.run("dvc", "queue", "status").stdout.split()), 400)
        assert "Success" in here.run("dvc", "queue", "status").stdout, here.run("dvc", "queue", "logs", "queued").stdout
    finally:
        # By its id: a request to end goes through the queue's folder, where the worker may miss it.
        (worker,) = here.folder.glob(".dvc/tmp/exps/celery/dvc-exp-worker-*.pid")
        pid = int(worker.read_text())
        kill_children(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert weights(here) == before, "nothing is trained again"
    runs = client.search_runs(["1"], f"tags.`{DVC_EXPERIMENT}` = 'queued'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    changed = json.loads(here.run("dvc", "exp", "diff", "HEAD", "queued", "--json").stdout)["metrics"]
    assert "reports/metrics.json" in changed


@pytest.mark.timeout(900)
def test_metrics_plots_and_experiments_name_the_settings(here: Project) -> None:
    shown = json.loads(here.run("dvc", "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    assert {"ddpm", "dvdp-600"} <= set(files["reports/metrics.json"]["data"])
    assert {"ddpm", "dvdp-600"} <= set(files["reports/timings.json"]["data"])

    # As a page, with the pictures beside it.
    here.run("dvc", "plots", "show", "--out", "shown")
    page = (here.folder / "shown" / "index.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "it can be read without a network"
    for picture in ("loss.png", "loss_levels.png", "contact_sheet.png"):
        assert list((here.folder / "shown").rglob(f"*{picture}"))
    # What docs/results.md names, drawn by a library from the network.
    options = ("--template", "runs", "-x", "images", "-y", "loss", "--json")
    plots: dict[str, Any] = json.loads(here.run("dvc", "plots", "show", "reports/plots/loss.csv", *options).stdout)
    (losses,) = plots["data"]["reports/plots/loss.csv"]
    assert {value["run"] for value in losses["content"]["data"]["values"]} == {"ddpm", "dvdp-600"}
    assert losses["content"]["encoding"]["color"]["field"] == "run", "one line for each"

    head, *rows = here.run("dvc", "exp", "show", "--csv").stdout.splitlines()
    columns = head.split(",")
    first = next(name for name in columns if "." in name)
    assert first == "ddpm.fd_labels", "the scores come first"
    assert columns.index("dvdp-600.fd_labels") < columns.index("ddpm.seconds_per_sample")
    assert "training.images" in columns
    assert "images_found" not in columns
    assert any(row.startswith("earlier,") for row in rows)


def weights(project: Project) -> dict[Path, int]:
    """When the weights of each run were written."""
    return {path: path.stat().st_mtime_ns for path in project.folder.glob("runs/*/weights.safetensors")}
