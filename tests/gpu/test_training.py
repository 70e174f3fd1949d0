"""Training on a fake GPU: nothing is on another device, and a step waits for nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.fake import FakeGpu, fake_gpu
from dvdp.diffusion.process import Process
from dvdp.models.export import load_model
from dvdp.models.layout import unet_layout
from dvdp.training import graphs, ledger
from dvdp.training.loop import Training, train
from tests.gpu.support import ABOUT, GPU, IMAGES, SMALL, batch, start, take_steps, tiny_run
from tests.logs import InterruptedHere, stop_after


def check_step(gpu: FakeGpu, training: Training) -> None:
    """That the step noted waited for nothing, copied only the labels, and that all state is on the GPU."""
    assert not gpu.waits
    assert all(copy.pinned and not copy.to_host for copy in gpu.copies), gpu.copies
    assert gpu.kernels > 100
    states = [value for o in training.optimizers for state in o.state.values() for value in state.values()]
    weights = [*training.network.parameters(), *training.ema.network.parameters()]
    assert {value.device for value in (*weights, *states, training.window)} == {GPU}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_keeps_to_its_device_and_waits_for_nothing(optimizer: str, precision: str) -> None:
    with fake_gpu() as gpu:
        training = start(tiny_run(optimizer=optimizer, precision=precision))
        take_steps(training, gpu)
        check_step(gpu, training)
        used = {k.dtype for k, *_ in gpu.launches if k.operator == "convolution"}
        assert used == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"networks": "per_level"}, {"levels": "one"}),
        ({"prediction_type": "epsilon", "num_classes": 0}, {"accumulation": 2}),
        ({"prediction_type": "sample"}, {"activation_checkpointing": True}),
        (SMALL, {"label_dropout": 0.2}),
    ],
    ids=["per_level", "accumulation", "activation_checkpointing", "label_dropout"],
)
def test_a_step_of_every_kind_waits_for_nothing(model: dict[str, Any], settings: dict[str, Any]) -> None:
    with fake_gpu() as gpu:
        training = start(tiny_run(model, precision="bf16", optimizer="adamw", **settings))
        take_steps(training, gpu, number=4 if "levels" in settings else 2)
        check_step(gpu, training)


@pytest.mark.parametrize(
    ("settings", "parts"), [({}, 2), ({"accumulation": 4}, 3)], ids=["whole levels", "accumulated"]
)
def test_parts_that_come_again_are_launched_as_one(
    settings: dict[str, Any], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for before in (100, 2):
        monkeypatch.setattr(graphs, "RUNS_BEFORE", before)
        with fake_gpu() as gpu:
            training = start(tiny_run(SMALL, precision="bf16", optimizer="adamw", **settings))
            take_steps(training, gpu, number=4)
            check_step(gpu, training)
            found.append((gpu.replays, gpu.launched, gpu.kernels))
    by_host, graphed = found
    assert (by_host[0], graphed[0]) == (0, parts)
    assert by_host[1] == by_host[2]
    assert graphed[1] < by_host[1] / 2.5
    assert graphed[2] - by_host[2] == 4 * parts, "what copies images, timesteps, noise and labels for the graph"


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"batch_fit": True}, {"precision": "fp32"}])
def test_what_a_graph_cannot_hold_is_launched_by_the_host(settings: dict[str, Any]) -> None:
    with fake_gpu() as gpu:
        training = start(tiny_run(SMALL, **{"precision": "bf16", **settings}))
        take_steps(training, gpu, number=4)
        assert (gpu.replays, gpu.launched) == (0, gpu.kernels)


def test_a_part_that_looks_at_a_number_is_launched_by_the_host(caplog: pytest.LogCaptureFixture) -> None:
    real = torch.nn.functional.mse_loss

    def looking(*tensors: Tensor) -> Tensor:
        loss = real(*tensors)
        assert loss.item() >= 0
        return loss

    with fake_gpu() as gpu, mock.patch.object(torch.nn.functional, "mse_loss", looking):
        take_steps(start(tiny_run(SMALL, precision="bf16")), gpu, number=5)
        assert gpu.replays == 0
    assert caplog.messages == [
        "training goes on without CUDA graphs, each kernel launched by the host: operation not permitted when stream is"
        " capturing: Wait(what='item', line=" + caplog.messages[0].split("line=", 1)[1]
    ]
    assert "test_training" in caplog.messages[0] or "dvdp/training/loop.py" in caplog.messages[0]


def test_recomputed_activations_are_launched_again() -> None:
    found = []
    for checkpointing in (False, True):
        with fake_gpu() as gpu:
            take_steps(start(tiny_run(activation_checkpointing=checkpointing)), gpu, number=1)
            found.append([launch.line.function for launch in gpu.launches if launch.kernel.operator == "convolution"])
    in_stages = [function for function in found[0] if "UNet.forward" not in function]
    # At each of two levels, all but the last convolution of each stage, whose output no gradient needs.
    stages = unet_layout(tiny_run().model).stages
    assert len(found[1]) - len(found[0]) == len(in_stages) - 2 * len(stages)


#: The shortest that has all: three steps of a network with no stage below the first, a checkpoint after each.
SHORT: dict[str, Any] = {"images": 24, "checkpoint_images": 8, "preview_images": 16, "preview_steps": 2}


@pytest.fixture
def _one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training begins with a trial of one step in place of a few."""
    monkeypatch.setattr("dvdp.training.estimate.STEPS", 1)


@pytest.mark.usefixtures("_one_trial")
@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "muon")])
def test_training_stops_shows_previews_goes_on_and_is_exported(tmp_path: Path, precision: str, optimizer: str) -> None:
    shown: list[tuple[int, torch.device, torch.Size]] = []

    def show(seen: int, samples: Tensor, path: Path) -> None:
        shown.append((seen, samples.device, samples.shape))
        if len(shown) == 1:
            raise InterruptedHere

    run = tiny_run(SMALL, optimizer=optimizer, precision=precision, **SHORT)
    with fake_gpu() as gpu:
        for stop in (stop_after(8), contextlib.nullcontext()):  # While it logs, and while it shows a preview.
            with pytest.raises(InterruptedHere), stop:
                train(run, IMAGES, tmp_path, "hash", device=GPU, description=ABOUT, preview=show)
        assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 1, "after 8 images"
        gpu.reset()
        train(run, IMAGES, tmp_path, "hash", device=GPU, description=ABOUT, preview=show)
        lines = {wait.line.function for wait in gpu.waits}
        assert not {line for line in lines if line.split()[1] in ("Training.step", "Training.update", "EMA.update")}
        model = load_model(tmp_path / "weights.safetensors", "cuda")
        assert {weight.device for weight in model.denoiser.network.parameters()} == {GPU}
    assert shown == [(seen, torch.device("cpu"), (2, 3, 8, 8)) for seen in (16, 16, 24)]
    assert [entry.images for entry in ledger.read(tmp_path / "metrics.jsonl")] == [8, 16, 24]


def test_a_table_left_on_the_host_is_found() -> None:
    def left_behind(self: Process, t: Tensor, level: int, device: object = None) -> tuple[Tensor, Tensor]:
        return self.schedule.signal[level:, t].T, self.schedule.noise[level:, t].T

    with fake_gpu() as gpu:
        training = start(tiny_run(SMALL))
        with mock.patch.object(Process, "signal_and_noise", left_behind), pytest.raises(RuntimeError, match="device"):
            take_steps(training, gpu)


def test_noise_drawn_on_the_host_is_found() -> None:
    real = torch.randn
    with fake_gpu() as gpu:
        training = start(tiny_run(SMALL))
        on_host = mock.patch.object(torch, "randn", lambda *size, device=None, **options: real(*size, **options))
        with on_host, pytest.raises(RuntimeError, match="device"):
            take_steps(training, gpu)


def test_a_wait_in_a_step_is_found_with_its_line() -> None:
    clip = torch.nn.utils.clip_grad_norm_

    def waiting(parameters: Any, most: float) -> Tensor:
        norm = clip(parameters, most)
        assert norm.item() < 1e9
        return norm

    with fake_gpu() as gpu, mock.patch.object(torch.nn.utils, "clip_grad_norm_", waiting):
        take_steps(start(tiny_run(SMALL)), gpu)
        assert [wait.what for wait in gpu.waits] == ["item"]
        assert gpu.waits[0].line.function.startswith("dvdp/training/")


def test_pixels_from_pageable_memory_are_found() -> None:
    with fake_gpu() as gpu:
        training = start(tiny_run({**SMALL, "num_classes": 0}))
        take_steps(training, gpu)
        gpu.reset()
        training.step(2, torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
        ((_, size, pinned, line),) = gpu.copies
        assert (size, pinned) == (8 * 3 * 64, False)
        assert line.function.startswith("dvdp/training/")
        assert batch()[0].device == GPU
