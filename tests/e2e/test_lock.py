"""One process at a time trains a run: the lock of its folder, with real processes and without Ray."""

from __future__ import annotations

import fcntl
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed

from dvdp import UserError
from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.training import ledger, loop


def tiny_run() -> Run:
    tree = {
        "dataset": {"resolution": 8},
        "model": {"model_channels": 4, "channel_mult": [1], "attention_factors": [], "num_classes": 0},
        "training": {"images": 120, "batch": 4, "log_images": 12, "checkpoint_images": 12, "preview_steps": 4},
    }
    return parse_params(tree).runs()[0]


def train(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (16, 3, 8, 8), dtype=np.uint8)
    loop.train(tiny_run(), ArrayImages(images), folder, "abc")


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 0.5)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process trains in"):
            train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    train(tmp_path)
    assert loop.is_finished(tmp_path)


def train_as_rank(rank: int, folder: Path, said: multiprocessing.Queue) -> None:
    loop.PATIENCE = 0.5
    store = (folder / "ranks").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        train(folder)
    except UserError as error:
        said.put(str(error))
    finally:
        torch.distributed.destroy_process_group()


def test_all_ranks_leave_a_run_that_another_process_trains(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ranks = [context.Process(target=train_as_rank, args=(rank, tmp_path, said)) for rank in range(2)]
        for process in ranks:
            process.start()
        answers = [said.get(timeout=60) for _ in ranks]
        for process in ranks:
            process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert answers[0] == answers[1]
    assert "another process trains in" in answers[0]


def test_of_two_processes_that_train_the_same_run_one_trains_and_the_other_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=train, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    deadline = time.monotonic() + 150
    for process in both:
        process.join(max(0.0, deadline - time.monotonic()))
    assert [process.exitcode for process in both] == [0, 0]
    assert [entry.images for entry in ledger.read(tmp_path / "metrics.jsonl")] == list(range(12, 121, 12))
    assert loop.is_finished(tmp_path)
