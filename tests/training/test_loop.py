"""Training in one process: what it leaves behind, and that it goes on to the bit."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from dvdp import UserError
from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.models.export import load_model
from dvdp.models.flops import relative_flops, training_images
from dvdp.training import checkpoints, ledger
from dvdp.training.ema import EMA
from dvdp.training.loop import Training, train
from tests.logs import InterruptedHere, hearing, stop_after


def tiny_run(**training: object) -> Run:
    tree = {
        "dataset": {"resolution": 16},
        "settings": {"small": {"process": "dvdp", "turning_points": [300, 600]}},
        "model": {
            "model_channels": 4,
            "channel_mult": [1, 2],
            "attention_factors": [2],
            "num_head_channels": 8,
            "num_classes": 0,
            "dropout": 0.1,
        },
        "training": {
            "images": 160,
            "budget": "images",
            "batch": 8,
            "warmup_images": 40,
            "checkpoint_images": 56,
            "log_images": 24,
            "preview_images": 80,
            "preview_count": 2,
            "preview_steps": 3,
            "optimizer": "adamw",
            "learning_rate": 0.001,
            "cooldown": 0.0,
            "precision": "fp32",
            "ema_halflife_images": 20_000,
            **training,
        },
        "sampling": {"steps": 4},
    }
    return parse_params(tree).runs()[0]


@pytest.fixture(scope="module")
def images() -> ArrayImages:
    """Flat colours with a bright bar: something to learn at every level."""
    random = np.random.default_rng(0)
    pictures = np.broadcast_to(random.integers(0, 128, (40, 3, 1, 1)), (40, 3, 16, 16)).astype(np.uint8)
    for picture, row in zip(pictures, random.integers(0, 14, 40), strict=True):
        picture[:, row : row + 2] = 255
    return ArrayImages(pictures)


@pytest.mark.parametrize(
    ("prediction_type", "precision", "optimizer"),
    [
        ("epsilon", "fp32", "adamw"),
        ("epsilon", "bf16", "adamw"),
        ("v_prediction", "fp32", "adamw"),
        ("v_prediction", "fp32", "muon"),
        ("sample", "fp32", "adamw"),
    ],
)
def test_training_lowers_the_loss_of_every_target(
    tmp_path: Path, images: ArrayImages, prediction_type: str, precision: str, optimizer: str
) -> None:
    settings = {"precision": precision, "optimizer": optimizer}
    run = tiny_run(images=480, learning_rate=5e-3, log_images=160, preview_images=0, **settings)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, prediction_type=prediction_type))
    train(run, images, tmp_path, "abc")
    losses = [entry.metrics["loss"] for entry in ledger.read(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, images: ArrayImages, optimizer: str
) -> None:
    run = tiny_run(optimizer=optimizer)
    train(run, images, tmp_path / "whole", "abc", flip=True)
    for stop in (72, 120):
        with pytest.raises(InterruptedHere), stop_after(stop):
            train(run, images, tmp_path / "broken", "abc", flip=True)
    train(run, images, tmp_path / "broken", "abc", flip=True)

    whole, broken = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    last = [checkpoints.find(tmp_path / name / "checkpoints")[-1] for name in ("whole", "broken")]
    states = [load_file(path) for path in last]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def losses(name: str) -> list[tuple[int, dict[str, float]]]:
        entries = ledger.read(tmp_path / name / "metrics.jsonl")
        return [(e.images, {k: v for k, v in e.metrics.items() if k.startswith("loss")}) for e in entries]

    assert losses("whole") == losses("broken"), "one value for each step, and the same"


class Counted(ArrayImages):
    """Notes which images are read."""

    read: list[int]

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        self.read.append(index)
        return super().__getitem__(index)


def test_the_images_of_the_next_step_are_read_before_a_log_waits_and_none_after_the_last(
    tmp_path: Path, images: ArrayImages
) -> None:
    counted = Counted(np.stack([images[i][0] for i in range(len(images))]))
    counted.read, logged = [], []

    def hear(line: str) -> None:
        logged.append((int(found[1]) if (found := re.search(r" (\d+) / ", line)) else 0, len(counted.read)))

    run = tiny_run(preview_images=0)
    with hearing(hear):
        train(run, counted, tmp_path / "whole", "abc")
    ahead = [(seen, min(seen + 8, 160)) for seen in (24, 48, 72, 96, 120, 144, 160)]
    assert logged == [(0, 0), *ahead]
    assert len(counted.read) == 160
    whole = counted.read

    counted.read = []
    with pytest.raises(InterruptedHere), stop_after(72):
        train(run, counted, tmp_path / "broken", "abc")
    assert counted.read == whole[:80]
    # It goes on after what steps have seen, not after what was read.
    counted.read = []
    train(run, counted, tmp_path / "broken", "abc")
    assert counted.read == whole[56:]
    # Killed between the last checkpoint and the weights, it has nothing left to read.
    weights = tmp_path / "broken" / "weights.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    counted.read = []
    train(run, counted, tmp_path / "broken", "abc")
    assert counted.read == []
    assert weights.read_bytes() == content


def test_a_run_leaves_weights_metrics_estimate_previews_and_the_last_checkpoints(
    tmp_path: Path, images: ArrayImages
) -> None:
    shown: list[tuple[int, tuple[int, ...]]] = []
    said: list[str] = []
    with hearing(said.append):
        train(
            tiny_run(keep_checkpoints=2),
            images,
            tmp_path,
            "abc",
            description={"dataset": "noise"},
            preview=lambda seen, samples, _: shown.append((seen, tuple(samples.shape))),
        )
    assert shown == [(80, (2, 3, 16, 16)), (160, (2, 3, 16, 16))]
    assert [path.stem for path in checkpoints.find(tmp_path / "checkpoints")] == ["000000000112", "000000000160"]
    assert [e.images for e in ledger.read(tmp_path / "metrics.jsonl")] == [24, 48, 72, 96, 120, 144, 160]
    assert "160 images" in said[0], "what it will cost is said before the first step"
    model = load_model(tmp_path / "weights.safetensors")
    assert model.description["training_hash"] == "abc"
    assert model.description["dataset"] == "noise"
    assert model.sample(2, steps=3).shape == (2, 3, 16, 16)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, images: ArrayImages) -> None:
    train(tiny_run(), images, tmp_path, "abc")
    before = (tmp_path / "weights.safetensors").stat().st_mtime_ns
    said: list[str] = []
    with hearing(said.append):
        train(tiny_run(), images, tmp_path, "abc")
    assert (tmp_path / "weights.safetensors").stat().st_mtime_ns == before
    assert not said


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path, images: ArrayImages) -> None:
    with pytest.raises(InterruptedHere), stop_after(72):
        train(tiny_run(), images, tmp_path, "abc")
    with pytest.raises(UserError, match="belongs to configuration abc, expected xyz"):
        train(tiny_run(), images, tmp_path, "xyz")


def test_a_damaged_checkpoint_is_named(tmp_path: Path, images: ArrayImages) -> None:
    with pytest.raises(InterruptedHere), stop_after(72):
        train(tiny_run(), images, tmp_path, "abc")
    path = checkpoints.find(tmp_path / "checkpoints")[-1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=path.name):
        train(tiny_run(), images, tmp_path, "abc")


@pytest.mark.parametrize("counts", [[8, 0, 0], [3, 2, 3], [0, 1, 7]])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_follows_the_gradient_of_the_mean_loss_over_its_images(
    tmp_path: Path, images: ArrayImages, counts: list[int], accumulation: int
) -> None:
    run = tiny_run(accumulation=accumulation)
    training = Training(run, images, tmp_path, "abc", False, torch.device("cpu"), None)
    # A loss that tells images and levels apart, without a draw: its gradient is the mean of its parts'.
    weights = next(training.network.parameters())
    batch = torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1).expand(8, 3, 16, 16)

    def loss(network: torch.nn.Module, level: int, part: torch.Tensor, *_: object) -> torch.Tensor:
        return (weights.sum() * 10**level * part.double().mean(dim=(1, 2, 3))).mean()

    training._loss = loss  # type: ignore[method-assign]
    training._backward(training.network, batch, counts)
    levels = np.repeat([0, 1, 2], counts)
    expected = np.mean([10.0**level * i for i, level in enumerate(levels)])
    torch.testing.assert_close(weights.grad, torch.full_like(weights, expected), rtol=1e-5, atol=0)
    assert training.window[1, :3].tolist() == counts


@pytest.mark.parametrize("levels", ["all", "one"])
def test_what_is_tried_before_training_goes_through_the_network_in_the_parts_of_a_step(
    tmp_path: Path, images: ArrayImages, levels: str
) -> None:
    # {333, 600}: of 60 images 20, 16 and 24 a step; of full size 15 at once.
    run = dataclasses.replace(tiny_run(batch=60, accumulation=4, levels=levels), turning_points=(333, 600))
    training = Training(run, images, tmp_path, "abc", False, torch.device("cpu"), None)
    seen: list[tuple[int, int]] = []

    def loss(network: torch.nn.Module, level: int, part: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((level, len(part)))
        return next(network.parameters()).sum() * 0

    training._loss = loss  # type: ignore[method-assign]
    training._estimate()
    tried = set(seen)
    assert tried == ({(0, 10), (1, 16), (2, 24)} if levels == "all" else {(0, 15), (1, 60), (2, 60)})
    seen.clear()
    for step in range(20):
        training.step(step, torch.zeros(60, 3, 16, 16, dtype=torch.uint8))
    assert all(min(abs(size - n) for at, n in tried if at == level) <= 1 for level, size in seen)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("networks", ["shared", "per_level"])
def test_activations_computed_again_take_less_memory_and_give_the_same_weights(
    tmp_path: Path, images: ArrayImages, precision: str, networks: str
) -> None:
    weights, saved = [], []
    for activation_checkpointing in (False, True):
        # Its dropout draws, and must draw the same again.
        run = tiny_run(activation_checkpointing=activation_checkpointing, precision=precision, levels="all")
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, networks=networks))  # type: ignore[arg-type]
        training = Training(run, images, tmp_path, "abc", False, torch.device("cpu"), None)
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for step in range(3):
                training.step(step, torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1).expand(8, 3, 16, 16) * 20)
        weights.append(training.network.state_dict())
        saved.append(kept)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert saved[1] < saved[0] / 3


def test_the_learning_rate_rises_over_the_warm_up_and_falls_over_the_cool_down(
    tmp_path: Path, images: ArrayImages
) -> None:
    run = tiny_run(warmup_images=40, cooldown=0.5, learning_rate=1.0, log_images=8, preview_images=0)
    training = Training(run, images, tmp_path, "abc", False, torch.device("cpu"), None)
    rates = []
    training.update = lambda *_: rates.append(training.learning_rate)  # type: ignore[method-assign]
    for step in range(20):
        training.step(step, torch.zeros(8))
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:10] == [1.0] * 5
    assert rates[10:] == pytest.approx([1 - i / 10 for i in range(10)])


def test_one_network_a_level_trains_the_one_of_its_level_alone_and_resumes_to_the_bit(
    tmp_path: Path, images: ArrayImages
) -> None:
    run = tiny_run(preview_images=0)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, networks="per_level"))
    training = Training(run, images, tmp_path, "abc", False, torch.device("cpu"), None)
    before = {name: tensor.clone() for name, tensor in training.network.state_dict().items()}
    training.update(torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), [0, 8, 0])
    moved = {
        name.split(".")[1] for name, tensor in training.network.state_dict().items() if (tensor != before[name]).any()
    }
    assert moved == {"1"}

    train(run, images, tmp_path / "whole", "abc")
    with pytest.raises(InterruptedHere), stop_after(72):
        train(run, images, tmp_path / "broken", "abc")
    train(run, images, tmp_path / "broken", "abc")
    whole, broken = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert load_model(tmp_path / "whole" / "weights.safetensors").sample(2, steps=3).shape == (2, 3, 16, 16)


def test_a_lift_with_the_datas_variance_needs_its_std_with_the_model(tmp_path: Path, images: ArrayImages) -> None:
    run = tiny_run(images=16)
    run = dataclasses.replace(run, sampling=dataclasses.replace(run.sampling, lift="data"))
    with pytest.raises(UserError, match=r"sampling\.lift: found 'data' and no band std"):
        train(run, images, tmp_path, "abc")
    std = [3.0, 3.0, 0.9]
    train(run, images, tmp_path, "abc", description={"band_std": std})
    model = load_model(tmp_path / "weights.safetensors")
    assert model.process.band_std == std
    found = model.sample(2)
    plain = load_model(tmp_path / "weights.safetensors", sampling=tiny_run(images=16).sampling).sample(2)
    assert not torch.equal(found, plain), "the lift adds more"


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(tmp_path: Path, images: ArrayImages) -> None:
    run = tiny_run(learning_rate=100.0, clip_norm=1e9, warmup_images=0)
    with pytest.raises(UserError, match="loss: found"):
        train(run, images, tmp_path, "abc")


def test_the_average_is_held_apart_and_follows_the_weights() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    ema = EMA(network, halflife=100, ramp=1.0)
    network.weight.data.fill_(1.0)
    ema.update(images=1000, batch=100)
    assert ema.network.weight.item() == pytest.approx(0.5), "a half-life of images later, half of the way"
    assert network.weight.item() == 1.0
    ema.update(images=50, batch=50)
    assert ema.network.weight.item() == pytest.approx(0.75), "early on, the ramp shortens the half-life"


def test_settings_share_flops_or_images() -> None:
    run = tiny_run(images=8_000, budget="flops")
    assert training_images(run) * relative_flops(run) == pytest.approx(8_000, rel=2e-3)
    assert training_images(tiny_run(images=8_000, budget="images")) == 8_000
