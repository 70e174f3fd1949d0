"""`dvc repro`: all of it, nothing of it, and what one changed setting takes; what DVC shows of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.tracking.runs import SAMPLING_HASH
from tests.e2e.support import TINY, Project

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
def test_a_changed_setting_is_trained_alone_and_dvc_shows_the_difference(here: Project) -> None:
    before = weights(here)
    slower = {**TINY["settings"]["dvdp-600"], "overrides": {"training": {"learning_rate": 0.001}}}
    settings = {**TINY["settings"], "dvdp-600": slower}
    here.write_params(settings=settings, training={"images": 1600})
    printed = here.run("dvc", "repro").stdout
    for stage in ("prepare", "extractor", "reference"):
        assert f"Stage '{stage}' didn't change, skipping" in printed

    after = weights(here)
    assert {path: time for path, time in after.items() if path in before} == before, "nothing is trained again"
    (new,) = after.keys() - before.keys()
    assert json.loads((new.parent / "run.json").read_text())["run"]["setting"] == "dvdp-600"

    changed = json.loads(here.run("dvc", "metrics", "diff", "--json").stdout)
    names = {name for file in changed.values() for name in file}
    assert any(name.startswith("dvdp-600.fd_labels") for name in names), names
    assert not any(name.startswith("ddpm.fd_labels") for name in names), names


@pytest.mark.timeout(900)
def test_metrics_plots_and_experiments_name_the_settings(here: Project) -> None:
    shown = json.loads(here.run("dvc", "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    assert {"ddpm", "dvdp-600"} <= set(files["reports/metrics.json"]["data"])
    assert files["data/digits/prepare.json"]["data"]["count"] == 1797

    plots: dict[str, Any] = json.loads(here.run("dvc", "plots", "show", "--json").stdout)
    (losses,) = plots["data"]["reports/plots/loss.csv"]
    assert {value["run"] for value in losses["content"]["data"]["values"]} == {"ddpm", "dvdp-600"}
    assert losses["content"]["encoding"]["color"]["field"] == "run", "one line for each"
    assert {"reports/plots/loss.png", "reports/plots/loss_levels.png"} <= set(plots["data"])
    assert any(name.endswith("contact_sheet.png") for name in plots["data"])
    # As a page, with the pictures beside it.
    here.run("dvc", "plots", "show", "--out", "shown")
    assert list((here.folder / "shown").rglob("*loss.png"))

    table = here.run("dvc", "exp", "show", "--csv").stdout
    head = table.splitlines()[0]
    for name in ("ddpm.fd_labels", "dvdp-600.fd_labels", "training.images"):
        assert name in head.split(",")


def weights(project: Project) -> dict[Path, int]:
    """When the weights of each run were written."""
    return {path: path.stat().st_mtime_ns for path in project.folder.glob("runs/*/weights.safetensors")}
