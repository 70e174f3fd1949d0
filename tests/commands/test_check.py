"""What `dvdp check` says before any work: the arithmetic, and what does not fit."""

import dataclasses
import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvdp.config import Params, parse_params
from dvdp.data.records import Form, encode
from dvdp.data.writer import StoreWriter
from dvdp.errors import UserError
from dvdp.models.export import save_model
from dvdp.models.flops import mean_flops, sample_flops, training_flops, training_images
from dvdp.models.unet import build_network
from dvdp.training.memory import run_bytes
from pipelines.commands import check as command
from pipelines.commands.check import GPUS, UTILISATION, check, image_bytes


def params(**sections: Any) -> Params:
    return parse_params({"dataset": {"name": "none"}, "seeds": [0, 1], **sections})


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(text: str) -> dict[str, list[str]]:
    """Cells by setting; two blanks lie between columns."""
    table = text.split("\n\n")[0].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("  ") if c.strip()] for line in table)}


def test_hours_and_price_on_a_gpu_follow_from_flops_peak_and_share() -> None:
    asked = params(training={"images": 10**9, "precision": "bf16"})
    found = rows(check(asked, "A100-80GB", 2.5, trial=False))
    rate = GPUS["A100-80GB"].tflops * 1e12 * UTILISATION
    hours = 0.0
    for run in asked.runs()[::2]:
        training = 3 * training_images(run) * mean_flops(run) / rate / 3600
        sampling = run.sampling.count * sample_flops(run) / rate / 3600
        cells = found[run.setting]
        assert [float(cells[4]), float(cells[5])] == pytest.approx([training, sampling], rel=0.01)
        assert float(cells[8].replace(",", "")) == pytest.approx(2.5 * (training + sampling), rel=0.01)
        hours += 2 * (training + sampling)
    assert float(found["all, 2 seeds"][-1].replace(",", "")) == pytest.approx(2.5 * hours, rel=0.01)


def test_a_plain_check_has_no_hours_and_says_how_to_get_them() -> None:
    text = check(params(), None, None, trial=False)
    assert all(cells[4:6] == ["-", "-"] for name, cells in rows(text).items() if name != "all, 2 seeds")
    assert "`dvdp check --trial` measures them" in text
    assert "4,156 bytes an image" in text, "the store that is not prepared yet"


def test_it_says_what_a_setting_starts_from_and_what_that_had_seen(tmp_path: Path) -> None:
    other = params(model={"model_channels": 8}).runs()[0]
    weights = build_network(other.model, 0).state_dict()
    save_model(tmp_path / "w.safetensors", weights, {"run": other.describe(), "images": 9_024})
    override = {"training": {"start": "w.safetensors"}}
    settings = {
        "ddpm": {"process": "ddpm"},
        "warm": {"process": "dvdp", "turning_points": [600], "overrides": override},
    }
    asked = params(settings=settings, model={"model_channels": 8})
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert (
        f"warm starts from 'w.safetensors' (SHA-256 {digest[:12]}), weights of ddpm that have seen 9,024 images,"
        f" {training_flops(other):.2e} FLOPs: no column counts these." in check(asked, None, None, trial=False)
    )
    with pytest.raises(UserError, match=r"found model\.model_channels 8 in 'w.safetensors', expected 16 as in setting"):
        check(params(settings=settings), None, None, trial=False)


def test_an_unknown_gpu_and_a_trial_elsewhere_are_refused() -> None:
    with pytest.raises(UserError, match="--gpu: found 'A10', expected one of A100-40GB,"):
        check(params(), "A10", None, trial=False)
    with pytest.raises(UserError, match="--trial: found it beside --gpu"):
        check(params(), "L4", None, trial=True)


def test_a_stored_trial_of_this_machine_or_of_a_named_device_is_read() -> None:
    asked = params(settings={"ddpm": {"process": "ddpm"}})
    run = asked.runs()[0]
    for device, gpu in (("NVIDIA H200", True), (command_device(), False)):
        seen = dataclasses.replace(asked, cluster=dataclasses.replace(asked.cluster, gpu=gpu))
        seen_run = seen.runs()[0]
        trial = {"device": device, "step_seconds": 0.36, "sample_seconds": 3.6, "memory_bytes": 3 << 30}
        asked.cluster.storage.mkdir(exist_ok=True)
        path = asked.cluster.storage / "trials.json"
        path.write_text(json.dumps({command._key(seen_run, seen, device): trial}))
        text = check(asked, "H200" if gpu else None, None, trial=False)
        cells = rows(text)["ddpm"]
        assert float(cells[4]) == pytest.approx(0.36 * training_images(run) / run.training.batch / 3600, rel=0.01)
        assert float(cells[5]) == pytest.approx(3.6 * run.sampling.count / 3600, rel=0.01)
        assert cells[6] == "3.00"
        assert f"a trial of a few steps on {device}" in text


def test_the_largest_part_of_a_stored_trial_is_said_with_its_accumulation() -> None:
    asked = params(settings={"ddpm": {"process": "ddpm"}}, training={"batch": 100, "accumulation": 2})
    run, device = asked.runs()[0], command_device()
    trial: dict[str, Any] = {"device": device, "step_seconds": 1, "sample_seconds": 1, "memory_bytes": 1 << 30}
    asked.cluster.storage.mkdir(exist_ok=True)

    def said(**parts: Any) -> str:
        entry = {command._key(run, asked, device): {**trial, **parts}}
        (asked.cluster.storage / "trials.json").write_text(json.dumps(entry))
        return check(asked, None, None, trial=False)

    assert "largest part" not in said(), "of an older release"
    text = said(part=50, largest_part=100, counted=True)
    sentence = "ddpm: the largest part that fits: 100 images of full size (training.accumulation: 1), counted from the"
    assert f"{sentence} memory of parts of at most 50." in text
    assert "Does not fit" not in text
    text = said(part=25, largest_part=34)
    assert f"34 images of full size (training.accumulation: 3), tried on {device}." in text
    assert (
        "Does not fit: ddpm has no memory for parts of 50 images; hours and GiB are of parts of 25. Set"
        " training.accumulation to 3, or training.batch_fit to true."
    ) in text


def command_device() -> str:
    from pipelines.commands.trial import device_name

    return device_name(gpu=False)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Does not fit" not in check(params(), None, None, trial=False)
    huge = params(training={"batch": 100_000})
    assert "Does not fit: ddpm needs" in check(huge, "L4", None, trial=False)
    assert "and L4 has 24.0; raise training.accumulation" in check(huge, "L4", None, trial=False)
    usage = namedtuple("usage", "total used free")
    needed = 2 * sum(run_bytes(run) for run in params().runs()[::2])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 0, needed))
    assert "of disk, and" in check(params(), None, None, trial=False)


@pytest.mark.parametrize("resolution", [8, 16, 32, 64])
def test_a_store_takes_the_bytes_that_are_counted(tmp_path: Path, resolution: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2000, 3, resolution, resolution), dtype=np.uint8)
    with StoreWriter(tmp_path / "store", name="x", source="none", form=Form(resolution)) as writer:
        for start in range(0, 2000, 500):
            writer.add(encode(list(images[start : start + 500]), [-1] * 500, Form(resolution)))
        writer.finish()
    size = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert 2000 * image_bytes(resolution) == pytest.approx(size, rel=0.05)
