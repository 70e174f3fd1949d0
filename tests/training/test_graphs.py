"""CUDA graphs of a step's parts on a CPU, where a stand-in computes a captured part again in the same memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdp.config import Run
from dvdp.training import graphs
from dvdp.training.graphs import PartGraphs
from dvdp.training.loop import Training
from tests.gpu.support import ABOUT, IMAGES, tiny_run

STEPS = 12


class Captured:
    """What was captured, and how often it was replayed."""

    def __init__(self) -> None:
        self.number = self.replays = 0
        self.weights: list[Tensor] = []
        self.spoil = 1.0
        """What gradients of replays are multiplied by."""

    def capture(self, work: Callable[[], Tensor], pool: object) -> tuple[Tensor, Callable[[], None]]:
        """As :func:`dvdp.training.graphs.capture`: each call of the second writes loss and gradients anew."""
        self.number += 1
        loss = work()
        gradients = [weight.grad for weight in self.weights]

        def replay() -> None:
            self.replays += 1
            loss.copy_(work())
            for weight, gradient in zip(self.weights, gradients, strict=True):
                if gradient is not None and weight.grad is not None:
                    gradient.copy_(weight.grad * self.spoil)
                weight.grad = None

        return loss, replay


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    """The stand-in, and a CPU in the place of the GPU whose memory and random numbers are asked for."""
    made = Captured()
    monkeypatch.setattr(graphs, "capture", made.capture)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    return made


def trained(run: Run, captured: Captured | None) -> tuple[list[Tensor], Tensor]:
    """Weights after some steps and the losses they summed, by graphs or without."""
    training = Training(run, IMAGES, Path(), "hash", False, torch.device("cpu"), None, ABOUT)
    if captured is not None:
        captured.weights = training.computing.copies
        training.graphs = PartGraphs(training.computing.copies)
    for step in range(STEPS):
        pixels = torch.stack([torch.from_numpy(IMAGES[(step + i) % 40][0]) for i in range(8)])
        training.step(step, pixels, torch.arange(step, step + 8) % 3)
    return [weight.detach() for weight in training.network.parameters()], training.window


def assert_same(found: tuple[list[Tensor], Tensor], expected: tuple[list[Tensor], Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({"num_classes": 0, "prediction_type": "epsilon"}, {"levels": "one", "optimizer": "adamw"}),
        ({"networks": "per_level"}, {"levels": "one"}),
        ({}, {"accumulation": 2}),
    ],
    ids=["all levels", "one level", "a network a level", "accumulation"],
)
def test_graphs_train_the_weights_that_training_without_them_does(
    captured: Captured, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    run = tiny_run(model, precision="bf16", learning_rate=1e-2, **settings)
    expected = trained(run, None)
    assert run.model.dropout > 0, "whose draws a capture must not disturb"
    assert_same(trained(run, captured), expected)
    assert captured.replays > STEPS / 2


def test_a_part_is_captured_once_it_has_come_twice(captured: Captured) -> None:
    run = tiny_run(precision="bf16", levels="one")
    training = Training(run, IMAGES, Path(), "hash", False, torch.device("cpu"), None, ABOUT)
    captured.weights = training.computing.copies
    training.graphs = PartGraphs(training.computing.copies)
    for step, (level, size) in enumerate([(0, 8), (1, 8), (0, 8), (0, 8), (0, 6), (0, 8), (1, 8), (1, 8)]):
        counts = [size if k == level else 0 for k in range(2)]
        training.update(torch.zeros(size, 3, 8, 8, dtype=torch.uint8), counts, torch.zeros(size).long(), step)
    # Level 0 with 8 images from the third time on, which is replayed to compare, then once more; level 1 then.
    assert (captured.number, captured.replays) == (2, 3)


def test_a_graph_with_other_gradients_is_not_used(captured: Captured, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(precision="bf16", learning_rate=1e-2)
    expected = trained(run, None)
    captured.spoil = 1.03
    with caplog.at_level(logging.WARNING):
        assert_same(trained(run, captured), expected)
    assert (captured.number, captured.replays) == (1, 1), "and no other is captured"
    assert caplog.messages == [
        "training goes on without CUDA graphs, each kernel launched by the host: a graph computes other gradients"
    ]


def test_a_capture_that_fails_costs_nothing(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(work: Callable[[], Tensor], pool: object) -> Any:
        work()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")

    run = tiny_run(precision="bf16", learning_rate=1e-2)
    expected = trained(run, None)
    monkeypatch.setattr(graphs, "capture", fail)
    with caplog.at_level(logging.WARNING):
        assert_same(trained(run, captured), expected)
    (message,) = caplog.messages
    assert message.endswith("by the host: CUDA error: operation not permitted when stream is capturing")


@pytest.mark.parametrize(("peak", "replayed"), [(0, True), (849_999_000, False)])
def test_nothing_is_captured_where_memory_is_short(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, peak: int, replayed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    run = tiny_run(precision="bf16")
    trained(replace(run, training=replace(run.training, levels="all")), captured)
    assert (captured.replays > 0) == replayed
