"""Class-conditional models draw the class they are asked for, and each as often as the data has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from dvdp import Process, Schedule, UserError, sample
from dvdp.config import ModelParams, Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.models.classes import Classes
from dvdp.models.export import TrainedModel, load_model
from dvdp.models.unet import build_network
from dvdp.training.loop import Training, train
from tests.logs import InterruptedHere, stop_after

SMALL = ModelParams(model_channels=8, channel_mult=(1, 2), attention_factors=(2,), num_head_channels=8, num_classes=3)
#: Two classes told apart by their brightness, 3 to 1, and images without a class.
ABOUT = {"labels": ["dark", "bright"], "label_counts": [30, 10, 0]}
CLASSES = Classes([30, 10, 0], ["dark", "bright"])


def drawn(count: int) -> NDArray[np.int64]:
    """The classes of the first images."""
    return CLASSES.draw(0, 0, count).numpy()


def class_run(label_dropout: float = 0.0, **model: object) -> Run:
    tree = {
        "dataset": {"resolution": 8},
        "settings": {"classes": {"process": "dvdp", "turning_points": [500]}},
        "model": {
            "model_channels": 8,
            "channel_mult": [1, 2],
            "attention_factors": [2],
            "num_head_channels": 8,
            "prediction_type": "v_prediction",
            "num_classes": 2,
            **model,
        },
        "training": {
            "images": 3200,
            "budget": "images",
            "batch": 16,
            "warmup_images": 160,
            "learning_rate": 0.003,
            "ema_halflife_images": 400,
            "preview_images": 3200,
            "preview_count": 8,
            "preview_steps": 8,
            "optimizer": "adamw",
            "cooldown": 0.0,
            "precision": "fp32",
            "label_dropout": label_dropout,
        },
        "sampling": {"steps": 20},
    }
    return parse_params(tree).runs()[0]


@pytest.fixture(scope="module")
def images() -> ArrayImages:
    labels = np.repeat([0, 1], [30, 10])
    pixels = np.random.default_rng(0).integers(0, 40, (40, 3, 1, 1)) + np.where(labels, 200, 10)[:, None, None, None]
    return ArrayImages(np.broadcast_to(pixels, (40, 3, 8, 8)).astype(np.uint8), labels)


@pytest.fixture(scope="module")
def model(images: ArrayImages, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder, shown = tmp_path_factory.mktemp("classes"), []
    train(class_run(), images, folder, "abc", description=ABOUT, preview=lambda *x: shown.append(x[1]))
    (preview,) = shown
    assert ((preview.double().mean(dim=(1, 2, 3)) > 125).numpy() == (drawn(8) == 1)).all(), "each has its class"
    return load_model(folder / "weights.safetensors")


@pytest.mark.parametrize("networks", ["shared", "per_level"])
def test_the_output_depends_on_the_class_of_each_image(networks: str) -> None:
    network = build_network(dataclasses.replace(SMALL, networks=networks), 1)  # type: ignore[arg-type]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 700)
    outputs = network(x, t, 1, torch.tensor([0, 1, 2, -1]))
    assert torch.pdist(outputs.flatten(1)).min() > 1e-3, "every class and none: another output"
    again = network(x, t, 1, torch.tensor([-1, 2, 1, 0]))
    torch.testing.assert_close(again, outputs.flip(0))


def test_an_unconditional_network_ignores_labels() -> None:
    torch.manual_seed(0)
    network = build_network(dataclasses.replace(SMALL, num_classes=0), 0)
    assert not any("classes" in name for name in network.state_dict())
    torch.nn.init.normal_(network.head[-1].weight)  # type: ignore[union-attr]
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 9])
    assert torch.equal(network(x, t, 0), network(x, t, 0, torch.tensor([1, 2])))


def test_a_class_conditional_network_is_not_called_without_labels() -> None:
    network = build_network(SMALL, 0)
    with pytest.raises(
        UserError, match="labels: found none, expected one for each image, as this network is conditional on 3"
    ):
        network(torch.randn(2, 3, 8, 8), torch.tensor([5, 9]), 0)


def test_each_class_is_drawn_as_often_as_the_data_has_it_whatever_the_batch() -> None:
    classes = Classes([5, 0, 1, 2])
    labels, other = (classes.draw(seed, 0, 8000) for seed in (3, 4))
    parts = [classes.draw(3, first, 1000) for first in range(0, 8000, 1000)]
    assert torch.equal(torch.cat(parts), labels)
    assert not torch.equal(other, labels)
    shares = {label: (labels == label).double().mean().item() for label in (0, 1, 2, -1)}
    assert shares == {0: pytest.approx(5 / 8, abs=0.03), 1: 0, 2: pytest.approx(1 / 8, abs=0.02), -1: shares[-1]}
    assert shares[-1] == pytest.approx(2 / 8, abs=0.02), "the last count is of images without a class"


def test_sampling_tells_the_denoiser_the_class_of_every_image_at_every_level() -> None:
    process, seen = Process(Schedule.dvdp([500])), []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return x

    sample(process, denoiser, (3, 3, 8, 8), 4, labels=torch.tensor([2, 0, -1]))
    assert [labels.tolist() for labels in seen] == [[2, 0, -1]] * 4
    with pytest.raises(UserError, match=r"labels: found \(1,\), expected one for each of 3 images; give \(3,\)"):
        sample(process, denoiser, (3, 3, 8, 8), 4, labels=torch.tensor([2]))


def test_a_step_tells_the_network_the_class_of_each_of_its_images(images: ArrayImages, tmp_path: Path) -> None:
    run = class_run()
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, accumulation=2))
    training = Training(run, images, tmp_path, "abc", False, torch.device("cpu"), None, ABOUT)
    seen: list[tuple[int, int]] = []

    def loss(network: torch.nn.Module, level: int, part: Tensor, t: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        seen.extend(zip(part[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))
        return next(network.parameters()).sum() * 0

    training._loss = loss  # type: ignore[method-assign]
    labels = torch.tensor([0, 1, 1, -1, 0, 1])
    numbered = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 8, 8)
    training.update(numbered, [4, 2], labels)
    assert seen == list(enumerate(labels.tolist()))
    with pytest.raises(UserError, match=r"labels: found 0 to 2, expected -1 \(none\) to 1, as model.num_classes is 2"):
        training.update(numbered, [4, 2], labels.clone().fill_(2).put_(torch.tensor([0]), torch.tensor([0])))


def test_gradients_of_classes_come_again_to_the_bit_on_several_threads() -> None:
    """Of many images and a wide embedding: threads could add their parts in any order."""
    torch.manual_seed(0)
    network = build_network(
        ModelParams(model_channels=64, channel_mult=(1,), attention_factors=(), num_head_channels=64, num_classes=2), 0
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, labels = torch.randn(512, 3, 4, 4), torch.arange(512), torch.arange(512) % 3 - 1
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            network.zero_grad()
            network(x, t, 0, labels).square().sum().backward()
            gradients.append(network.classes.weight.grad.clone())  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(threads)
    assert gradients[0].abs().max() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_a_trained_model_draws_the_class_it_is_asked_for(model: TrainedModel) -> None:
    dark, bright = (model.sample(16, label=label).double() for label in ("dark", "bright"))
    means = [images.mean(dim=(1, 2, 3)) for images in (dark, bright)]
    assert means[0].max() < 100
    assert means[1].min() > 150


def test_without_a_class_asked_for_each_image_has_its_own(model: TrainedModel) -> None:
    images = model.sample(24, batch=7).double().mean(dim=(1, 2, 3))
    assert ((images > 125).numpy() == (drawn(24) == 1)).all()
    assert torch.equal(model.sample(3, first=5), model.sample(8)[5:])


def test_a_class_there_is_not_is_named(model: TrainedModel) -> None:
    with pytest.raises(UserError, match=r"^label: found 'darc' \(did you mean 'dark'\?\), expected one of dark, br"):
        model.sample(1, label="darc")
    with pytest.raises(UserError, match=r"^label: found '7', expected one of dark, bright\.$"):
        model.sample(1, label=7)  # type: ignore[arg-type]
    never = dataclasses.replace(model, classes=Classes([5, 0, 0], CLASSES.names))
    with pytest.raises(UserError, match=r"^label: found 'bright', expected one of dark\.$"):
        never.sample(1, label="bright")
    unnamed = dataclasses.replace(model, classes=Classes(CLASSES.counts))
    with pytest.raises(UserError, match=r"^label: found 'dark', expected none, as the model does not name its classes"):
        unnamed.sample(1, label="dark")
    plain = dataclasses.replace(model, classes=None)
    with pytest.raises(UserError, match=r"^label: found 'dark', expected none, as this model is unconditional"):
        plain.sample(1, label="dark")


@pytest.mark.parametrize("about", [{}, {"label_counts": [30, 10]}, {"label_counts": [0, 0, 0]}])
def test_training_with_classes_needs_to_know_how_often_each_comes(
    images: ArrayImages, tmp_path: Path, about: dict[str, object]
) -> None:
    with pytest.raises(UserError, match=r"^model\.num_classes: found 2 and label counts \[.*\] with the model"):
        train(class_run(), images, tmp_path, "abc", description=about)


def shown_labels(run: Run, images: ArrayImages, folder: Path, steps: int = 6, rank: int = 0) -> list[list[int]]:
    """The labels that the network is shown at each step, in the order of the images."""
    training = Training(run, images, folder, "abc", False, torch.device("cpu"), None, ABOUT)
    shown: list[list[int]] = []

    def loss(network: torch.nn.Module, level: int, part: Tensor, t: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        shown[-1].extend(labels.tolist())
        return (0.0 * next(network.parameters())).sum()

    training._loss = loss  # type: ignore[method-assign]
    pixels, labels = torch.zeros((16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 2
    for step in range(steps):
        shown.append([])
        training.step(step, pixels, labels)
    return shown


def test_each_step_drops_the_same_labels_however_it_is_cut_or_resumed(images: ArrayImages, tmp_path: Path) -> None:
    run = class_run(label_dropout=0.4)
    whole = shown_labels(run, images, tmp_path)
    assert all(label in (-1, i % 2) for step in whole for i, label in enumerate(step))
    assert 0.2 < sum(step.count(-1) for step in whole) / 96 < 0.6
    assert len({tuple(step) for step in whole}) > 1
    for change in ({"accumulation": 8}, {"batch_fit": True, "accumulation": 4}):
        parted = dataclasses.replace(run, training=dataclasses.replace(run.training, **change))
        assert shown_labels(parted, images, tmp_path / "parted") == whole
    assert shown_labels(class_run(), images, tmp_path) == [[0, 1] * 8] * 6


def test_an_interrupted_training_with_label_dropout_ends_with_the_bits_of_an_undisturbed_one(
    images: ArrayImages, tmp_path: Path
) -> None:
    run = class_run(label_dropout=0.3)
    short = {"images": 64, "checkpoint_images": 16, "log_images": 16, "preview_images": 0}
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, **short))
    train(run, images, tmp_path / "whole", "abc", description=ABOUT)
    with pytest.raises(InterruptedHere), stop_after(32):
        train(run, images, tmp_path / "broken", "abc", description=ABOUT)
    train(run, images, tmp_path / "broken", "abc", description=ABOUT)
    whole, broken = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_model_is_guided_for_one_call_by_all_levels_or_by_each(model: TrainedModel) -> None:
    run = dataclasses.replace(model.run, training=dataclasses.replace(model.run.training, label_dropout=0.1))
    trained = dataclasses.replace(model, run=run)
    plain = model.sample(4, seed=3, label="bright")
    assert torch.equal(trained.sample(4, seed=3, label="bright", guidance=1), plain)
    strong = trained.sample(4, seed=3, label="bright", guidance=4.0)
    assert not torch.equal(strong, plain)
    by_level = trained.sample(4, seed=3, label="bright", guidance=[4, 4.0])
    assert torch.equal(by_level, strong)
    assert not torch.equal(trained.sample(4, seed=3, label="bright", guidance=[1, 4]), strong)


@pytest.mark.parametrize(
    ("guidance", "sentence"),
    [
        (
            2.0,
            "^guidance: found 2.0 for a network that is trained without label_dropout, expected 1, which is no guid",
        ),
        ([2, 2, 2], r"^guidance: found 3 numbers, \[2.0, 2.0, 2.0\], expected one for each of 2 levels, finest first"),
        (-1, "^guidance: found -1, expected at least 0 or a list.$"),
        (float("inf"), "^guidance: found inf, expected"),
        ("high", "^guidance: found 'high', expected a number or a list.$"),
    ],
)
def test_a_guidance_that_does_not_fit_the_model_is_one_sentence(
    model: TrainedModel, guidance: Any, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        model.sample(1, guidance=guidance)


def test_a_model_without_label_dropout_is_not_drawn_under_params_that_guide(model: TrainedModel) -> None:
    run = dataclasses.replace(model.run, sampling=dataclasses.replace(model.run.sampling, guidance_scale=3))
    with pytest.raises(
        UserError, match=r"^sampling.guidance_scale: found 3.0 for a network .* label_dropout such as 0.1.$"
    ):
        TrainedModel.of(run, ABOUT, model.denoiser.network, model.device)
