"""Training that starts from weights: which fit, what is taken over, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.errors import UserError
from dvdp.identity import training_hash, training_identity
from dvdp.models.export import save_model
from dvdp.models.flops import training_flops, training_images
from dvdp.models.unet import build_network
from dvdp.training import checkpoints
from dvdp.training.loop import Training, train
from dvdp.training.start import starting_weights, with_start
from tests.logs import InterruptedHere, stop_after

IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8))


def make(
    points: tuple[int, ...] = (), resolution: int = 16, model: dict[str, Any] | None = None, **training: Any
) -> Run:
    size = {"model_channels": 4, "channel_mult": [1, 2], "attention_factors": [2], "num_head_channels": 4}
    few = {"images": 32, "budget": "images", "batch": 8, "warmup_images": 0, "preview_images": 0, "log_images": 8}
    tree = {
        "dataset": {"resolution": resolution},
        "settings": {"s": {"process": "dvdp" if points else "ddpm", "turning_points": list(points)}},
        "model": {**size, "num_classes": 0, **(model or {})},
        "training": {**few, "precision": "fp32", "checkpoint_images": 8, "preview_steps": 4, **training},
        "sampling": {"steps": 4},
    }
    return parse_params(tree).runs()[0]


def noisy(run: Run, seed: int = 1) -> dict[str, Tensor]:
    """Weights of the run's network, none of them zero."""
    torch.manual_seed(seed)
    network = build_network(run.model, len(run.turning_points))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.state_dict()


def saved(path: Path, run: Run, **about: Any) -> Path:
    save_model(
        path, noisy(run), {"run": run.describe(), "training_hash": "abc", "images": training_images(run), **about}
    )
    return path


def outputs(run: Run, weights: dict[str, Tensor]) -> list[Tensor]:
    """What the network says at each level of 16 px images."""
    network = build_network(run.model, len(run.turning_points))
    network.load_state_dict(weights)
    x, t = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16), torch.tensor([500])
    return [network.eval()(x, t, level).detach() for level in range(len(run.turning_points) + 1)]


@pytest.mark.parametrize("networks", ["shared", "per_level"])
def test_a_ddpm_is_the_start_of_every_level(tmp_path: Path, networks: str) -> None:
    ddpm = make()
    path = saved(tmp_path / "w.safetensors", ddpm)
    run = with_start(make((300, 600), start=str(path), model={"networks": networks}))
    (said,) = outputs(ddpm, noisy(ddpm))
    for found in outputs(run, starting_weights(run, path)):
        torch.testing.assert_close(found, said, rtol=0, atol=0)


@pytest.mark.parametrize("networks", ["shared", "per_level"])
def test_a_level_starts_as_the_one_with_images_of_its_size_or_the_nearest(tmp_path: Path, networks: str) -> None:
    other = make((300, 600), resolution=32, model={"networks": networks})  # 32, 16 and 8 px
    path = saved(tmp_path / "w.safetensors", other)
    said = outputs(other, noisy(other))
    run = with_start(make((200, 400), start=str(path), model={"networks": "per_level"}))  # 16, 8 and 4 px
    found = outputs(run, starting_weights(run, path))
    for level, nearest in enumerate((1, 2, 2)):
        torch.testing.assert_close(found[level], said[nearest], rtol=0, atol=0)


def test_network_and_average_begin_at_the_weights_and_optimisers_afresh(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", make())
    run = with_start(make((300,), start=str(path), learning_rate=1e-12, optimizer="adamw"))
    train(run, IMAGES, tmp_path / "run", "hash")
    weights, expected = load_file(tmp_path / "run" / "weights.safetensors"), starting_weights(run, path)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    first = load_file(checkpoints.path(tmp_path / "run" / "checkpoints", 24))
    assert {int(value) for name, value in first.items() if name.endswith(".step")} <= {3}


def test_an_interrupted_run_goes_on_from_its_checkpoint_though_the_start_is_gone(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", make())
    run = with_start(make((300,), start=str(path)))
    train(run, IMAGES, tmp_path / "whole", "hash")
    with pytest.raises(InterruptedHere), stop_after(24):
        train(run, IMAGES, tmp_path / "broken", "hash")
    path.unlink()
    train(run, IMAGES, tmp_path / "broken", "hash")
    whole, broken = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_the_hash_is_of_what_the_file_holds_and_not_of_where_it_lies(tmp_path: Path) -> None:
    scratch = make((300,))
    path = saved(tmp_path / "w.safetensors", make())
    copy = Path(shutil.copy(path, tmp_path / "copy.safetensors"))
    other = saved(tmp_path / "other.safetensors", make(), remark="another file")
    hashes = [
        training_hash(with_start(make((300,), start=str(each))), "digest", flip=False) for each in (path, copy, other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert training_hash(scratch, "digest", flip=False) not in hashes
    assert "start" not in {**training_identity(scratch), **training_identity(scratch)["training"]}
    with pytest.raises(UserError, match=r"^training\.start: found '.*' in a run that does not know what it holds"):
        training_hash(make((300,), start=str(path)), "digest", flip=False)


def test_what_the_weights_had_seen_adds_up_over_trainings(tmp_path: Path) -> None:
    first = make()
    one = with_start(make((300,), start=str(saved(tmp_path / "1.safetensors", first))))
    assert one.start is not None
    assert (one.start.images, one.start.flops) == (training_images(first), training_flops(first))
    assert (one.start.setting, one.start.training) == ("s", "abc")
    assert one.start.seen == f"32 images, {training_flops(first):.2e} FLOPs"
    two = with_start(make((600,), start=str(saved(tmp_path / "2.safetensors", one))))
    assert two.start is not None
    assert two.start.images == 64
    assert two.start.flops == pytest.approx(training_flops(first) + training_flops(one))
    assert Run.from_description(two.describe()) == two
    unknown = with_start(make((600,), start=str(saved(tmp_path / "3.safetensors", one, images=None))))
    assert unknown.start is not None
    assert unknown.start.seen == "an unknown number of images"


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = noisy(make())
    change(weights)
    save_model(path, weights, {"run": make().describe(), "images": 32})


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "missing": (Path.unlink, {}, "found no file '{path}', expected a weights.safetensors; give the"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), {}, "found no file '{path}'"),
    "no safetensors": (lambda path: path.write_text("weights"), {}, "'{path}' is no whole safetensors file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), {}, "'{path}' is no whole safetensors file"),
    "a checkpoint": (
        lambda path: checkpoints.write(path.parent, checkpoints.Checkpoint(8, {}), "abc", 1).replace(path),
        {},
        "'{path}' is a safetensors file of another kind or version, expected 'dvdp model 1'",
    ),
    "target": (None, {"prediction_type": "epsilon"}, "found model.prediction_type v_prediction in '{path}', expected"),
    "width": (None, {"model_channels": 8}, "found model.model_channels 4 in '{path}', expected 8 as in setting 's'"),
    "stages": (None, {"channel_mult": [1, 2, 2]}, "found model.channel_mult [1, 2] in '{path}', expected [1, 2, 2]"),
    "classes": (None, {"num_classes": 10}, "found model.num_classes 0 in '{path}', expected 10"),
    "channels": (
        lambda path: edit(path, lambda w: w.update({"stem.weight": w["stem.weight"][:, :1]})),
        {},
        "found weights 'stem.weight' of shape [4, 1, 3, 3] in '{path}', expected [4, 3, 3, 3]",
    ),
    "a weight too few": (
        lambda path: edit(path, lambda w: w.pop("stem.bias")), {}, "found weights 'stem.bias' of shape none",
    ),
    "a weight too many": (
        lambda path: edit(path, lambda w: w.update(more=torch.zeros(2))), {}, "found weights 'more' of shape [2]",
    ),
    "networks": (
        lambda path: saved(path, make((300,), model={"networks": "per_level"})),
        {},
        "found model.networks per_level in '{path}', expected shared",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_weights_that_cannot_be_a_start_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    change, model, sentence = MISTAKES[name]
    path = saved(tmp_path / "w.safetensors", make())
    if change:
        change(path)
    with pytest.raises(UserError) as caught:
        with_start(make((300,), start=str(path), model=model))
    assert str(caught.value).startswith("training.start: ")
    assert sentence.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_between_check_and_training_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", make())
    run = with_start(make((300,), start=str(path)))
    saved(path, make(), remark="another")
    with pytest.raises(UserError, match=r"^training\.start: found SHA-256 .* expected .* as when the run was named"):
        train(run, IMAGES, tmp_path / "run", "hash")
    assert not checkpoints.find(tmp_path / "run" / "checkpoints")


def test_dropout_the_schedule_and_the_order_of_attention_factors_may_differ(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", make(model={"attention_factors": [1, 2]}))
    run = make((300,), start=str(path), model={"dropout": 0.1, "attention_factors": [2, 1]})
    run = dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, base="cosine"))
    assert with_start(run).start is not None


def test_a_setting_is_timed_without_its_weights() -> None:
    run = make((300,), start="nowhere.safetensors")
    assert Training(run, IMAGES, Path(), "timing", False, torch.device("cpu"), None).total == 32
