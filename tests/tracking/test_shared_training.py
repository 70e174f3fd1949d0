"""Settings whose turning points are chosen after training: one folder, and samples and versions of their own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dvdp.config import Params, parse_params
from dvdp.models.export import load_model, save_model
from dvdp.models.unet import build_network
from pipelines.commands.check import check
from pipelines.jobs.job import Job
from pipelines.jobs.sample import Sampler
from pipelines.tracking.job_runs import description, model_file
from pipelines.tracking.registry import read_weights, register, weights_digest
from pipelines.tracking.runs import TRAINING_HASH, TURNING_POINTS, open_run
from tests.tracking.support import empty_store


def params(storage: Path) -> Params:
    names = {f"subspace-{t}": {"process": "subspace", "turning_points": [t]} for t in (300, 600)}
    size = {"model_channels": 8, "channel_mult": [1], "attention_factors": [], "num_head_channels": 8, "num_classes": 0}
    tree = {"dataset": {"resolution": 8}, "settings": names, "model": size, "cluster": {"storage": str(storage)}}
    more = {"training": {"span": "all", "preview_steps": 4}, "sampling": {"steps": 4, "count": 8}}
    return parse_params({**tree, **more, "evaluation": {"samples": 8, "kid_subset": 4}})


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Two settings, the first of which has trained."""
    asked = params(tmp_path / "runs")
    first, second = (Job(asked, run, "digest") for run in asked.runs())
    torch.manual_seed(0)
    network = build_network(first.run.model, 1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    about = {"training_hash": first.training_hash, TRAINING_HASH: first.training_hash, TURNING_POINTS: "[300]"}
    save_model(first.weights, network.state_dict(), {**about, "run": first.run.describe()})
    return [first, second]


def test_they_share_the_folder_and_draw_from_it_with_their_own_turning_points(jobs: list[Job]) -> None:
    first, second = jobs
    assert first.folder == second.folder
    assert first.samples != second.samples
    drawn = []
    for job in jobs:
        sampler = Sampler(
            str(job.weights), str(job.samples), job.run.sampling, 1, "cpu", job.run.turning_points
        )  # fmt: skip
        sampler(0, 4)()
        drawn.append(np.load(job.samples / "00000000.npy"))
        expected = load_model(job.weights, turning_points=job.run.turning_points).sample(4).numpy()
        np.testing.assert_array_equal(drawn[-1], expected)
    assert not np.array_equal(*drawn)


def test_each_becomes_a_version_that_draws_with_its_own_turning_points(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client, numbers = empty_store(tmp_path), []
    for job in jobs:
        file = model_file(job)
        assert load_model(file).process.schedule.turning_points == job.run.turning_points
        tags = description(job)
        assert json.loads(tags[TURNING_POINTS]) == list(job.run.turning_points)
        run = open_run(client, "mine", "dvdp.sampling_hash", job.sampling_hash, job.name)
        numbers.append(register(run, "dvdp-digits", file, tags).version)
    assert [int(number) for number in numbers] == [1, 2]
    assert model_file(jobs[0]) == jobs[0].weights, "as it was trained"
    assert len({weights_digest(*read_weights(model_file(job))) for job in jobs}) == 2


def test_a_check_says_that_they_have_one_training(jobs: list[Job]) -> None:
    sentence = "subspace-300 and subspace-600 have one training, done once; the totals count it for each."
    asked = jobs[0].params
    assert sentence in check(asked, None, None, trial=False)
    apart = dataclasses.replace(asked, training=dataclasses.replace(asked.training, span="level"))
    assert "one training" not in check(apart, None, None, trial=False)
