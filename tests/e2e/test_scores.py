"""`dvdp sample` and `dvdp evaluate` as commands: killed, on several workers, again, and on a registered model."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient

from pipelines.tracking.runs import EVALUATION_OF
from tests.e2e.support import Project, sentence, wait_until

#: More than two shards of one batch each, and no multiple of one.
COUNT = 700
CHANGES = {"sampling": {"count": COUNT, "steps": 50, "batch": 200}}
SAMPLE = ("dvdp", "sample", "--setting", "dvdp-600")


@pytest.fixture(scope="module")
def calm(undisturbed: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The shards of a command that nobody disturbed, by name."""
    project = undisturbed.copy(tmp_path_factory.mktemp("calm") / "project", **CHANGES)
    project.run(*SAMPLE)
    found = shards(project)
    assert {name: len(images) for name, images in found.items()} == {
        "00000000.npy": 200,
        "00000200.npy": 200,
        "00000400.npy": 200,
        "00000600.npy": 100,
    }
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sampling_killed_at_random_moments_keeps_its_shards_and_ends_with_the_same_images(
    undisturbed: Project, tmp_path: Path, calm: dict[str, np.ndarray]
) -> None:
    here = undisturbed.copy(tmp_path / "project", **CHANGES)
    source, kept = random.Random(0), {}
    for _ in range(3):
        process = here.start(*SAMPLE)
        wait_until(lambda process=process: drawing(process) or process.poll() is not None)
        time.sleep(source.uniform(0, 4))
        kill_driver(process)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a shard was drawn again"
        kept = {path: path.stat().st_mtime_ns for path in here.folder.glob("runs/*/samples/*/*.npy")}

    left = COUNT - sum(len(np.load(path)) for path in kept)
    done = here.run(*SAMPLE)
    # Rate and time left are those of images.
    assert not left or re.search(rf"{left}/{left} \[\d+:\d+<.*image", done.stderr)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a shard was drawn again"
    found = shards(here)
    assert found.keys() == calm.keys()
    for name, images in found.items():
        np.testing.assert_array_equal(images, calm[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_with_odd_batches_draw_the_same_images(
    undisturbed: Project, tmp_path: Path, calm: dict[str, np.ndarray]
) -> None:
    changes = {"sampling": {**CHANGES["sampling"], "batch": 37}, "cluster": {"num_workers": 2}}
    here = undisturbed.copy(tmp_path / "project", **changes)
    # A run is named for its ranks too; the weights are taken as if two ranks had trained them.
    named = sentence(here.run(*SAMPLE, status=2).stderr).split("'")[1]
    (here.folder / named).mkdir()
    shutil.copy(undisturbed.runs()["dvdp-600"] / "weights.safetensors", here.folder / named)
    here.run(*SAMPLE)
    found = shards(here)
    assert len(found) == 19
    drawn, expected = (np.concatenate([images for _, images in sorted(each.items())]) for each in (found, calm))
    assert np.abs(drawn.astype(int) - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_evaluating_again_adds_only_what_mlflow_does_not_know(project: Callable[..., Project]) -> None:
    short = {"images": 1600}
    here = project(training=short)
    here.run("dvdp", "experiment", "--reports", "reports")
    champion = ("dvdp", "evaluate", "--model", "models:/dvdp-digits@champion")
    # The samples that are there, and the champion sampled anew in the same way: both as the experiment found.
    scored = here.run("dvdp", "evaluate").stdout
    again = here.run(*champion).stdout
    assert again.splitlines()[0].split(": ")[1] in scored
    assert evaluations(here) == []

    here.write_params("other.yaml", training=short, sampling={"steps": 8})
    first = here.run(*champion, "--params", "other.yaml")
    assert "64/64" in first.stderr
    before = {path: path.stat().st_mtime_ns for path in here.folder.glob("runs/models/**/*")}
    second = here.run(*champion, "--params", "other.yaml")
    assert second.stdout == first.stdout
    assert "64/64" not in second.stderr
    assert {path: path.stat().st_mtime_ns for path in here.folder.glob("runs/models/**/*")} == before
    assert len(evaluations(here)) == 1

    here.run("dvdp", "reference", "--export", "digits.npz")
    for _ in range(2):
        here.run("dvdp", "evaluate", "--setting", "ddpm", "--statistics", "digits.npz")
    assert len(evaluations(here)) == 2


def shards(project: Project) -> dict[str, np.ndarray]:
    """All samples of a project that has sampled one setting."""
    return {path.name: np.load(path) for path in sorted(project.folder.glob("runs/*/samples/*/*.npy"))}


def drawing(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Ray processes that draw images for a command now."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ray::Sampler" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def kill_driver(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver alone, unless it has finished; what draws for it must end by itself."""
    orphans = drawing(process)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert not alive


def evaluations(project: Project) -> list[str]:
    """The runs of evaluations, each beneath another run."""
    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dvdp")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    found = [run for run in runs if EVALUATION_OF in run.data.tags]
    parents = {run.info.run_id for run in runs} - {run.info.run_id for run in found}
    assert all(run.data.tags["mlflow.parentRunId"] in parents for run in found)
    return [run.info.run_id for run in found]
