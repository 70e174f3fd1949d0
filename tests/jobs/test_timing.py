"""Times of settings with nothing beside them."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dvdp.config import Params, Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.hardware import device_name
from dvdp.models.export import TrainedModel
from dvdp.training.loop import Training
from pipelines.jobs import timing as module
from pipelines.jobs.job import Job
from pipelines.jobs.timing import Timing, call_seconds, time_on_worker, time_settings, timing, untrained

TREE: dict[str, Any] = {
    "settings": {"ddpm": {"process": "ddpm"}, "dvdp": {"process": "dvdp", "turning_points": [300, 600]}},
    "seeds": [0, 1],
    "dataset": {"resolution": 16},
    "model": {
        "model_channels": 4,
        "channel_mult": [1, 2],
        "attention_factors": [2],
        "num_head_channels": 4,
        "num_classes": 0,
    },
    "training": {"batch": 10, "loader_workers": 0},
    "sampling": {"steps": 10, "batch": 4},
    "cluster": {"threads": 1},
}


def params(storage: Path) -> Params:
    return parse_params({**TREE, "cluster": {"threads": 1, "storage": str(storage)}})


def test_work_beside_them_changes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of which half the readings are late, as much as by a factor of 8."""
    source, now = random.Random(0), [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds * (1 if source.random() < 0.5 else source.uniform(1, 8))

    def update(training: Training, _images: Any, counts: list[int], _labels: Any) -> None:
        spend(sum(count / 4**level for level, count in enumerate(counts)))

    def draw(_model: TrainedModel, count: int, options: dict[str, Any], callback: Any) -> None:
        for level, calls in reversed(list(enumerate(options["share"]))):
            for _ in range(calls):
                spend(count / 4**level)
                callback(SimpleNamespace(level=level))

    monkeypatch.setattr(module, "clock", lambda _device: now[0])
    monkeypatch.setattr(module, "SECONDS", math.inf)
    monkeypatch.setattr(Training, "update", update)
    monkeypatch.setattr(TrainedModel, "draw", draw)
    ddpm, _, dvdp, _ = params(tmp_path).runs()
    found = time_on_worker([ddpm, dvdp], params(tmp_path).cluster, "cpu")
    # A batch of 10 and 10 steps: all of them at full size, or 3 of 10 there, 3 at a quarter and 4 at a sixteenth.
    assert [each.seconds_per_step for each in found] == pytest.approx([10, 3 + 3 / 4 + 4 / 16])
    assert [each.seconds_per_sample for each in found] == pytest.approx([10, 3 + 3 / 4 + 4 / 16])


def test_a_setting_is_timed_by_real_steps_and_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURNS", 1)
    (found,) = time_on_worker([params(tmp_path).runs()[2]], params(tmp_path).cluster, "cpu")
    assert min(found.seconds_per_step, found.seconds_per_sample) > 0
    assert found.device == device_name(gpu=False), "times of another machine are not compared with these"


def test_every_level_is_timed_however_short_it_is(tmp_path: Path) -> None:
    (_, _, short, _) = params(tmp_path).runs()
    short = dataclasses.replace(short, turning_points=(998, 999))
    images = ArrayImages(np.zeros((1, 3, 16, 16), np.uint8))
    found = call_seconds(untrained(short, images, 1, torch.device("cpu")))
    assert len(found) == 3
    assert min(found) > 0


def test_settings_are_timed_once_and_all_again_where_one_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def on_worker(_cluster: Any, _work: Any, runs: list[Run], *_: Any) -> list[Timing]:
        asked.append(len(runs))
        return [Timing("cpu", float(len(run.turning_points)), 1.0) for run in runs]

    monkeypatch.setattr(module, "on_worker", on_worker)
    jobs = [Job(params(tmp_path), run, "digest") for run in params(tmp_path).runs()]
    time_settings(jobs[:2])
    time_settings(jobs[:2])
    time_settings(jobs)
    time_settings(jobs)
    assert asked == [1, 2]
    # Of both seeds.
    assert [found.seconds_per_step for job in jobs if (found := timing(job))] == [0, 0, 2, 2]
