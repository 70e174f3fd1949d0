"""The GPU scripts: each mode and input at toy size on a CPU, their budget, and no more than a bare machine has."""

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import cifar10, steps
from benchmarks.gpu.cifar10 import frechet, read_images
from benchmarks.machine import machine
from dvdp.config import ModelParams, read_params
from dvdp.errors import UserError
from dvdp.evaluation.extractors import train_extractor
from dvdp.training.levels import level_counts

PROJECT = Path(__file__).parents[2]
HEAVY = {
    "ray", "prefect", "mlflow", "dvc", "lmdb", "albumentations", "cv2", "sklearn", "scipy", "matplotlib",
    "torch_fidelity", "torchvision", "diffusers", "jinja2",
}  # fmt: skip
WORKS = [
    "training, ddpm", "training, level 0", "training, level 1", "training, level 2", "training, all levels",
    "sampling, ddpm", "sampling, dvdp",
]  # fmt: skip
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


def run_bare(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module where none of HEAVY can be imported."""
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({HEAVY}));"
        f"sys.argv[0] = {module!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


def options(out: Path, **others: object) -> argparse.Namespace:
    """Of the script that measures steps, at toy size."""
    given = {"resolution": 256, "mode": ["eager"], "turns": 1, "seconds": 500.0, "toy": True, "out": out}
    return argparse.Namespace(**given | others)


def pictures(count: int, resolution: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def test_gpu_scripts_import_nothing_that_a_bare_machine_lacks() -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY}));"
        "import benchmarks.gpu.steps, benchmarks.gpu.cifar10, benchmarks.throughput"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("resolution", "preset"), [(256, "folder-256"), (32, "cifar10-32")])
def test_the_networks_measured_are_those_of_the_presets(resolution: int, preset: str) -> None:
    params = read_params(PROJECT / "presets" / f"{preset}.yaml")
    batch, sampled, turning_points, model = steps.PAPER[resolution]
    assert model == params.model, "width, blocks, attention, what is predicted"
    assert (resolution, batch, sampled) == (params.dataset.resolution, params.training.batch, params.sampling.batch)
    assert turning_points == [*params.settings.values()][-1].turning_points


def test_steps_are_measured_in_each_eager_mode(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    done = run_bare("benchmarks.gpu.steps", "--toy", "--mode", "channels_last", "eager", "--turns", 1, "--out", path)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["complete"] is True
    assert result["bounds"]["training"] > 2
    assert list(result["modes"]) == ["channels_last", "eager"]
    peak = max(result["peak_tflops"].values())
    for mode, about in result["modes"].items():
        assert list(about["measured"]) == WORKS, "a run cut short has the parts of the ratio first"
        for name, found in about["measured"].items():
            assert found["share_of_peak"] == pytest.approx(found["tflops_per_second"] / peak)
            assert f"{mode}, {name}: " in done.stdout
        assert about["summary"]["sampling, ddpm over dvdp"] > 0
        assert about["summary"]["training, ddpm over dvdp, all levels a step"] > 0
        assert "goals" not in about, "they are of 256 px"


@pytest.mark.slow
@COMPILER
def test_steps_are_measured_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelParams(model_channels=4, channel_mult=(1,), attention_factors=(), num_head_channels=4, num_classes=0)
    monkeypatch.setattr(steps, "TOY", {8: (10, small)})
    steps.run(options(tmp_path / "steps.json", resolution=32, mode=["compiled"], seconds=3000.0))
    result = json.loads((tmp_path / "steps.json").read_text())
    assert result["complete"] is True
    measured = result["modes"]["compiled"]["measured"]
    assert list(measured) == [name for name in WORKS if "level 2" not in name]
    assert measured["training, ddpm"]["first_seconds"] > measured["training, ddpm"]["seconds"]


def test_no_time_leaves_a_valid_result(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    done = run_bare("benchmarks.gpu.steps", "--toy", "--seconds", 0.01, "--mode", "eager", "--out", path)
    assert done.returncode == 0, done.stderr
    assert "--seconds: 0.01 are over" in done.stdout
    result = json.loads(path.read_text())
    assert result["complete"] is False
    assert result["modes"] == {"eager": {"measured": {}}}


def test_what_was_measured_when_the_time_is_up_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, calls = tmp_path / "steps.json", steps.measure, []

    def hangs_at_the_third(*arguments: object) -> dict[str, float]:
        calls.append(json.loads(path.read_text())["modes"]["eager"]["measured"])
        if len(calls) < 3:
            return real(*arguments)  # type: ignore[arg-type]
        with steps.limited(0.1):
            time.sleep(60)
        raise AssertionError

    monkeypatch.setattr(steps, "measure", hangs_at_the_third)
    steps.run(options(path, mode=["eager", "channels_last"]))
    assert [list(measured) for measured in calls] == [[], WORKS[:1], WORKS[:2]], "each is written at once"
    result = json.loads(path.read_text())
    assert list(result["modes"]["eager"]["measured"]) == WORKS[:2]
    assert list(result["modes"]["eager"]["summary"]) == ["TFLOP/s at level 0"]
    assert result["modes"]["channels_last"] == {"measured": {}}
    assert result["complete"] is False


def test_time_is_up_wherever_the_work_is() -> None:
    def stubborn() -> None:
        """As a compiler that goes on without what failed."""
        while True:
            with contextlib.suppress(Exception):
                time.sleep(60)

    began = time.perf_counter()
    with pytest.raises(steps.TimeIsUp), steps.limited(0.2):
        stubborn()
    assert time.perf_counter() - began < 30
    with pytest.raises(steps.TimeIsUp), steps.limited(-1):
        raise AssertionError
    with steps.limited(0.1):
        pass
    time.sleep(0.2)


def test_goals_say_what_was_found_and_whether_it_is_met() -> None:
    took = {"training, ddpm": 0.14, "training, level 0": 0.14, "training, level 1": 0.04, "training, level 2": 0.01}
    measured = {name: {"seconds": each, "tflops_per_second": 290.0} for name, each in took.items()}
    found = steps.goals(steps.summary(measured, [0.3, 0.3, 0.4], 64))
    assert {name: goal["met"] for name, goal in found.items()} == {
        "seconds of an iteration": True,
        "TFLOP/s at level 0": False,
        "training, ddpm over dvdp, one level a step": True,
    }
    assert found["seconds of an iteration"]["found"] == pytest.approx(0.058)
    assert found["seconds of an iteration"]["goal"] == "at most 0.06"
    del measured["training, level 2"]
    assert list(steps.goals(steps.summary(measured, [0.3, 0.3, 0.4], 64))) == ["TFLOP/s at level 0"]
    assert steps.goals({}) == {}


def test_the_commit_can_be_given_where_git_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVDP_COMMIT", "abc")
    assert machine()["commit"] == "abc"


TOY_RUN = ["--seconds", 1, "--samples", 16, "--sample-steps", 4, "--extractor-epochs", 1, "--toy"]


def test_settings_are_scored_at_equal_flops_without_labels_too(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pictures(60))
    out = tmp_path / "out"
    done = run_bare("benchmarks.gpu.cifar10", "--images", tmp_path / "images.npy", *TOY_RUN, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "result.json").read_text())
    assert found["extractor"]["task"] == "rotation"
    assert (found["optimizer"], found["levels_of_a_step"]) == ("muon", "all")
    assert list(found["settings"]) == ["ddpm", "dvdp-600", "dvdp-400"]
    for name, row in found["settings"].items():
        step = row["flops"] / row["images"] * 20
        assert abs(row["flops"] - found["training_flops_of_each"]) <= step, "equal FLOPs, but for a step"
        assert row["fd_rotation"] >= 0
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_archive_is_scored_by_an_extractor_made_before(tmp_path: Path) -> None:
    path, images = tmp_path / "images.tar.xz", pictures(40)
    with tarfile.open(path, "w:xz") as archive:
        for i, image in enumerate(images):
            member = tarfile.TarInfo(f"set/train/{'ab'[i % 2]}/{i:04d}.png")
            member.size = len(png(image))
            archive.addfile(member, io.BytesIO(png(image)))
    pixels, labels = read_images(path)
    train_extractor(cifar10.ArrayImages(pixels, labels), "labels", 1, "before", tmp_path / "before")
    given = ["--images", path, "--extractor", tmp_path / "before/extractor.safetensors"]
    done = run_bare("benchmarks.gpu.cifar10", *given, *TOY_RUN, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert found["extractor"]["data"] == "before"
    assert all(row["fd_labels"] >= 0 for row in found["settings"].values())
    assert not (tmp_path / "out/extractor.safetensors").exists()
    np.save(tmp_path / "larger.npy", pictures(2, resolution=32))
    given[1] = tmp_path / "larger.npy"
    done = run_bare("benchmarks.gpu.cifar10", *given, *TOY_RUN, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("--extractor: found a feature network of 16 px")


@pytest.mark.soak
@COMPILER
def test_settings_train_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelParams(model_channels=4, channel_mult=(1,), attention_factors=(), num_head_channels=4, num_classes=0)
    monkeypatch.setattr(cifar10, "TOY_MODEL", small)
    np.save(tmp_path / "images.npy", pictures(20, resolution=8))
    given = ["--images", tmp_path / "images.npy", *TOY_RUN, "--compile", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["cifar10", *map(str, given)])
    assert cifar10.main() == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["compile"] is True
    assert list(found["settings"]) == ["ddpm", "dvdp-600", "dvdp-400"]


def test_a_trial_learns_nothing() -> None:
    run = steps.make_run((600,), 16, cifar10.TOY_MODEL, cifar10.TOY_TRAINING)
    pixels = pictures(20).transpose(0, 3, 1, 2).copy()
    training = steps.start(run, pixels, torch.device("cpu"))
    before = [weight.clone() for weight in training.network.parameters()]
    assert cifar10.trial(training, torch.from_numpy(pixels)) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, training.network.parameters(), strict=True))


def test_each_level_always_has_as_many_images() -> None:
    for points in ((600,), (400,)):
        schedule = steps.make_run(points, 32, cifar10.MODEL, cifar10.TRAINING).build_schedule()
        counts = {tuple(level_counts(schedule, "all", 0, n, cifar10.TRAINING.batch)) for n in range(50)}
        assert len(counts) == 1, "or torch.compile makes more of them"


def test_arrays_are_read_with_and_without_labels(tmp_path: Path) -> None:
    images = pictures(6)
    np.savez(tmp_path / "both.npz", images=images, labels=np.arange(6) % 3)
    np.savez(tmp_path / "alone.npz", images=images)
    np.save(tmp_path / "alone.npy", images.transpose(0, 3, 1, 2))
    pixels, labels = read_images(tmp_path / "both.npz")
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    for name in ("alone.npz", "alone.npy"):
        found, none = read_images(tmp_path / name)
        assert none is None
        assert np.array_equal(found, pixels)
    for name in ("gone.npy", "broken.npz"):
        (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
        with pytest.raises(UserError, match=r"expected an \.npz with 'images'"):
            read_images(tmp_path / name)


def test_of_a_folder_or_archive_the_train_part_is_read_with_its_classes(tmp_path: Path) -> None:
    images, root = pictures(4), tmp_path / "set"
    names = ["test/dog/0.png", "train/cat/0.png", "train/dog/0.png", "train/dog/1.png"]
    for name, image in zip(names, images, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(image))
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(root, "set")
    before = sorted(tmp_path.rglob("*"))
    for path in (root, tmp_path / "set.tar"):
        pixels, labels = read_images(path)
        assert np.array_equal(pixels, images[1:].transpose(0, 3, 1, 2))
        assert labels is not None
        assert labels.tolist() == [0, 1, 1]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked"
    assert read_images(root / "train/dog")[1] is None


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--images: found nothing at"):
        read_images(tmp_path / "gone.tar")
    with pytest.raises(UserError, match="--images: found no images in"):
        read_images(tmp_path)
    (tmp_path / "a.png").write_bytes(png(pictures(1)[0]))
    (tmp_path / "b.png").write_bytes(png(pictures(1, resolution=8)[0]))
    with pytest.raises(UserError, match="--images: found sizes 8x8, 16x16 in"):
        read_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"--images: cannot read 'b\.png'"):
        read_images(tmp_path)


def test_the_frechet_distance_of_the_gpu_script_is_torch_fidelitys() -> None:
    from dvdp.evaluation import fidelity

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    b = 2 * b @ torch.randn(8, 8, generator=generator, dtype=torch.float64) + 1
    ours = frechet(*((features.mean(0), features.T.cov()) for features in (a, b)))
    assert ours == pytest.approx(fidelity.frechet(a, b), rel=1e-6)
