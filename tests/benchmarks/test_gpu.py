"""The script for a GPU: each part and input at toy size on a CPU, its budget, and no more than a bare machine has."""

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
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import equal_flops, lease, steps
from benchmarks.gpu.equal_flops import frechet, read_images
from benchmarks.gpu.roofline import ROOFLINE
from benchmarks.machine import machine
from benchmarks.steps import make_run, start
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
    """Of the script, at toy size."""
    given = {"seconds": 500.0, "parts": ["compiled", "eager"], "images": None, "extractor": None, "out": out}
    return argparse.Namespace(**given | {"extractor_epochs": 1, "toy": True} | others)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lease.json").read_text())


def pictures(count: int, resolution: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def test_what_runs_on_a_gpu_imports_nothing_that_a_bare_machine_lacks() -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY}));import benchmarks.gpu.lease, benchmarks.throughput"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("resolution", "preset"), [(256, "church-256"), (32, "cifar10-32")])
def test_the_networks_measured_are_those_of_the_presets(resolution: int, preset: str) -> None:
    params = read_params(PROJECT / "presets" / f"{preset}.yaml")
    batch, sampled, turning_points, model = steps.PAPER[resolution]
    assert model == params.model, "width, blocks, attention, what is predicted"
    assert (resolution, batch, sampled) == (params.dataset.resolution, params.training.batch, params.sampling.batch)
    assert turning_points == [*params.settings.values()][-1].turning_points


def test_all_parts_are_measured_in_the_order_of_their_worth(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pictures(60))
    out = tmp_path / "out"
    given = ["--toy", "--seconds", 500, "--images", tmp_path / "images.npy", "--extractor-epochs", 1, "--out", out]
    done = run_bare("benchmarks.gpu.lease", *given)
    assert done.returncode == 0, done.stderr
    result = read(out)
    peak = max(result["peak_tflops"].values())
    assert list(result["parts"]) == ["compiled", "eager", "training"]
    assert all(part["complete"] for part in result["parts"].values())
    for name in ("compiled", "eager"):
        part = result["parts"][name]
        assert list(part["measured"]) == WORKS, "a part cut short has the parts of the ratio first"
        for work, found in part["measured"].items():
            assert found["share_of_peak"] == pytest.approx(found["tflops_per_second"] / peak)
            assert found["predicted_seconds"] is None, "the roofline is of an H200 and the paper's networks"
            assert f"{name}, {work}: " in done.stdout
        assert part["summary"]["sampling, ddpm over dvdp"] > 0
        assert part["summary"]["training, ddpm over dvdp, all levels a step"] > 0
        assert "goals" not in part
    training = result["parts"]["training"]
    assert training["extractor"]["task"] == "rotation", "without labels"
    assert (training["optimizer"], training["levels_of_a_step"]) == ("muon", "all")
    assert list(training["settings"]) == ["ddpm", "dvdp-600", "dvdp-400"]
    for name, row in training["settings"].items():
        step = row["flops"] / row["images"] * 20
        assert abs(row["flops"] - training["training_flops_of_each"]) <= step, "equal FLOPs, but for a step"
        assert row["fd_rotation"] >= 0
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert result["machine"]["command"].startswith("python -m benchmarks.gpu.lease --toy")


@pytest.mark.slow
@COMPILER
def test_steps_are_measured_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelParams(model_channels=4, channel_mult=(1,), attention_factors=(), num_head_channels=4, num_classes=0)
    monkeypatch.setattr(lease, "PAPER", {8: (10, 2, (600,), small)})
    monkeypatch.setattr(lease, "RESOLUTION", 8)
    monkeypatch.setattr(lease, "predictions", lambda compiled: {"training, ddpm": 1.0})
    about: dict[str, Any] = {}
    lease.measure_steps(True, False, torch.device("cpu"), {"peak_tflops": {"matmul": 1.0}}, about, lambda: None)
    measured = about["measured"]
    assert list(measured) == [name for name in WORKS if "level 2" not in name]
    assert measured["training, ddpm"]["first_seconds"] > measured["training, ddpm"]["seconds"]
    assert measured["training, ddpm"]["predicted_seconds"] == 1.0
    assert about["goals"].keys() == steps.GOALS.keys()


def test_no_time_leaves_a_valid_result(tmp_path: Path) -> None:
    done = run_bare("benchmarks.gpu.lease", "--toy", "--seconds", 0.01, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--images: found none" in done.stdout
    assert "compiled: its seconds are over" in done.stdout
    assert read(tmp_path)["parts"] == {"compiled": {"complete": False}, "eager": {"complete": False}}


def test_what_was_measured_when_the_time_is_up_is_kept_and_the_next_part_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = lease.measure, []

    def hangs_at_the_third(*arguments: object) -> dict[str, float]:
        calls.append(list(read(tmp_path)["parts"]["compiled"].get("measured", {})))
        if len(calls) == 3:
            with steps.limited(0.1):
                time.sleep(60)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lease, "measure", hangs_at_the_third)
    lease.run(options(tmp_path))
    assert calls[:3] == [[], WORKS[:1], WORKS[:2]], "each is written at once"
    compiled, eager = read(tmp_path)["parts"].values()
    assert list(compiled["measured"]) == WORKS[:2]
    assert list(compiled["summary"]) == ["TFLOP/s at level 0"]
    assert not compiled["complete"]
    assert list(eager["measured"]) == WORKS
    assert eager["complete"]


def test_a_part_that_fails_says_why_and_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lease.measure_steps

    def fails(compiled: bool, *arguments: Any) -> None:
        if compiled:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real(compiled, *arguments)

    monkeypatch.setattr(lease, "measure_steps", fails)
    lease.run(options(tmp_path))
    compiled, eager = read(tmp_path)["parts"].values()
    assert compiled == {"complete": False, "error": "OutOfMemoryError: CUDA out of memory."}
    assert eager["complete"]
    with pytest.raises(UserError, match="--images: found nothing at"):
        lease.run(options(tmp_path, parts=["training"], images=tmp_path / "gone"))
    assert "found nothing at" in read(tmp_path)["parts"]["training"]["error"]


def test_every_work_has_its_prediction() -> None:
    parts = json.loads(ROOFLINE.read_text())["networks"]["256 px"]["parts"]
    for compiled, key in ((False, "seconds"), (True, "seconds_graphed")):
        found = lease.predictions(compiled)
        assert set(WORKS) == found.keys()
        assert found["training, ddpm"] == found["training, level 0"] == parts["step, level 0"][key]
        assert found["sampling, ddpm"] == pytest.approx(10 * parts["sampler call, level 0"][key])
        calls = [parts[f"sampler call, level {level}"][key] for level in range(3)]
        assert found["sampling, dvdp"] == pytest.approx(3 * calls[0] + 3 * calls[1] + 4 * calls[2])


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


TOY_RUN = ["--parts", "training", "--seconds", 500, "--extractor-epochs", 1, "--toy"]


def test_an_archive_is_scored_by_an_extractor_made_before(tmp_path: Path) -> None:
    path, images = tmp_path / "images.tar.xz", pictures(40)
    with tarfile.open(path, "w:xz") as archive:
        for i, image in enumerate(images):
            member = tarfile.TarInfo(f"set/train/{'ab'[i % 2]}/{i:04d}.png")
            member.size = len(png(image))
            archive.addfile(member, io.BytesIO(png(image)))
    pixels, labels = read_images(path)
    train_extractor(equal_flops.ArrayImages(pixels, labels), "labels", 1, "before", tmp_path / "before")
    given = ["--images", path, "--extractor", tmp_path / "before/extractor.safetensors"]
    done = run_bare("benchmarks.gpu.lease", *given, *TOY_RUN, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out")["parts"]["training"]
    assert found["extractor"]["data"] == "before"
    assert all(row["fd_labels"] >= 0 for row in found["settings"].values())
    assert not (tmp_path / "out/extractor.safetensors").exists()
    np.save(tmp_path / "larger.npy", pictures(2, resolution=32))
    given[1] = tmp_path / "larger.npy"
    done = run_bare("benchmarks.gpu.lease", *given, *TOY_RUN, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("--extractor: found a feature network of 16 px")


def test_a_trial_learns_nothing() -> None:
    run = make_run((600,), 16, equal_flops.TOY_MODEL, equal_flops.TOY_TRAINING)
    pixels = pictures(20).transpose(0, 3, 1, 2).copy()
    training = start(run, pixels, torch.device("cpu"))
    before = [weight.clone() for weight in training.network.parameters()]
    assert equal_flops.trial(training, torch.from_numpy(pixels)) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, training.network.parameters(), strict=True))


def test_each_level_always_has_as_many_images() -> None:
    for points in ((600,), (400,)):
        schedule = make_run(points, 32, equal_flops.MODEL, equal_flops.TRAINING).build_schedule()
        counts = {tuple(level_counts(schedule, "all", 0, n, equal_flops.TRAINING.batch)) for n in range(50)}
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


def test_the_frechet_distance_of_the_script_is_torch_fidelitys() -> None:
    from dvdp.evaluation import fidelity

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    b = 2 * b @ torch.randn(8, 8, generator=generator, dtype=torch.float64) + 1
    ours = frechet(*((features.mean(0), features.T.cov()) for features in (a, b)))
    assert ours == pytest.approx(fidelity.frechet(a, b), rel=1e-6)
