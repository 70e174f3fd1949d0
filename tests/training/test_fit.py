"""Training that runs out of memory: told in one sentence, or gone on with in smaller parts, to the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.errors import UserError
from dvdp.models.unet import UNet
from dvdp.out_of_memory import OutOfMemory
from dvdp.training import ledger
from dvdp.training.fit import FILE
from dvdp.training.loop import Training, train
from tests.logs import InterruptedHere, hearing, stop_after

SIDE = 16
PROJECT = Path(__file__).parents[2]


def run_of(dropout: float = 0.1, points: tuple[int, ...] = (300, 600), **training: Any) -> Run:
    """16 images a step: of {300, 600} 5, 5 and 6 of each level, give or take one."""
    tree = {
        "dataset": {"resolution": SIDE},
        "settings": {"small": {"process": "dvdp", "turning_points": list(points)}},
        "model": {
            "model_channels": 4,
            "channel_mult": [1, 2],
            "attention_factors": [2],
            "num_head_channels": 8,
            "num_classes": 0,
            "dropout": dropout,
        },
        "training": {
            "images": 160,
            "budget": "images",
            "batch": 16,
            "warmup_images": 0,
            "checkpoint_images": 48,
            "log_images": 48,
            "preview_images": 0,
            "optimizer": "adamw",
            "learning_rate": 0.001,
            "cooldown": 0.0,
            "precision": "fp32",
            **training,
        },
    }
    return parse_params(tree).runs()[0]


@pytest.fixture(scope="module")
def images() -> ArrayImages:
    return pictures()


def pictures() -> ArrayImages:
    return ArrayImages(np.random.default_rng(0).integers(0, 256, (40, 3, SIDE, SIDE), dtype=np.uint8))


@contextlib.contextmanager
def memory_for(fits: Callable[[torch.Tensor], bool], backward: bool = False) -> Iterator[None]:
    """Within it, a network raises torch's error for an input that does not fit, on its way forward or back."""
    forward = UNet.forward

    def limited(self: UNet, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if fits(x):
            return forward(self, x, *arguments)

        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        if not backward:
            fail()
        out = forward(self, x, *arguments)
        out.register_hook(fail)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", limited)
        yield


def at_most(count: int) -> Callable[[torch.Tensor], bool]:
    """So many images of full size fit, or as many pixels of others."""
    return lambda x: len(x) * x.shape[-1] ** 2 <= count * SIDE**2


def failing_from(call: int, count: int) -> Callable[[torch.Tensor], bool]:
    """As :func:`at_most`, from so many calls of the network on; before, all fits."""
    calls = 0

    def fits(x: torch.Tensor) -> bool:
        nonlocal calls
        calls += 1
        return calls < call or at_most(count)(x)

    return fits


def assert_same(one: Path, two: Path) -> None:
    """To the bit: weights, the optimiser's state and the losses logged."""
    for name in ("weights.safetensors", "checkpoints/000000000160.safetensors"):
        first, second = (load_file(folder / name) for folder in (one, two))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert losses(one) == losses(two)


def losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    entries = ledger.read(folder / "metrics.jsonl")
    return [(e.images, {k: v for k, v in e.metrics.items() if k.startswith(("loss", "grad"))}) for e in entries]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("networks", ["shared", "per_level"])
def test_a_run_in_parts_that_fit_has_the_bits_of_one_with_these_parts_from_the_start(
    tmp_path: Path, images: ArrayImages, backward: bool, networks: str
) -> None:
    """Also with dropout, whose masks depend on the parts."""
    fitting, parted = (run_of(**change) for change in ({"batch_fit": True}, {"accumulation": 8}))
    fitting, parted = (
        dataclasses.replace(run, model=dataclasses.replace(run.model, networks=networks)) for run in (fitting, parted)
    )
    said: list[str] = []
    with memory_for(at_most(2), backward), hearing(said.append):
        train(fitting, images, tmp_path / "fitting", "abc")
    assert json.loads((tmp_path / "fitting" / FILE).read_text()) == [[0, 2]]
    assert [line for line in said if "memory ran out" in line] == [
        "small seed 0: memory ran out at level 0 with 4 images at a time; from 0 images on the batch of 16 goes"
        " through the network in parts of at most 2 images of full size, not 16"
    ]
    train(parted, images, tmp_path / "parted", "abc")
    assert_same(tmp_path / "fitting", tmp_path / "parted")


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_runs_out_later_is_done_again_from_its_start(
    tmp_path: Path, images: ArrayImages, backward: bool
) -> None:
    """Gradients of its first parts are dropped and their losses are counted once: as if told before it began."""
    run = run_of(batch_fit=True)
    # 4 steps are tried before the first one; each calls the network 3 times.
    with memory_for(failing_from(3 * 4 + 3 * 4 + 2, 1), backward):
        train(run, images, tmp_path / "later", "abc")
    assert json.loads((tmp_path / "later" / FILE).read_text()) == [[64, 1]]
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / FILE).write_text("[[64, 1]]")
    train(run, images, tmp_path / "told", "abc")
    assert_same(tmp_path / "later", tmp_path / "told")

    train(run, images, tmp_path / "whole", "abc")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("later", "whole"))
    assert any(not torch.equal(one[name], two[name]) for name in one), "the parts are others"


def test_a_resumed_run_goes_on_with_the_parts_that_were_found(tmp_path: Path, images: ArrayImages) -> None:
    run = run_of(batch_fit=True)
    with memory_for(failing_from(3 * 4 + 3 * 2 + 1, 2)):
        train(run, images, tmp_path / "whole", "abc")
    assert json.loads((tmp_path / "whole" / FILE).read_text()) == [[32, 2]]
    with memory_for(failing_from(3 * 4 + 3 * 2 + 1, 2)), pytest.raises(InterruptedHere), stop_after(144):
        train(run, images, tmp_path / "broken", "abc")
    # Where there is memory again, it is trained as it was.
    train(run, images, tmp_path / "broken", "abc")
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_how_a_step_is_cut_changes_nothing_but_rounding(tmp_path: Path, images: ArrayImages) -> None:
    weights = []
    for accumulation in (1, 16):
        training = Training(
            run_of(dropout=0.0, accumulation=accumulation), images, tmp_path, "abc", False, torch.device("cpu"), None
        )
        pixels = torch.from_numpy(np.stack([images[i][0] for i in range(16)]))
        gradients = []
        torch.manual_seed(0)
        training._backward(training.network, pixels, [5, 5, 6])
        gradients = [parameter.grad for parameter in training.network.parameters()]
        weights.append(torch.cat([each.flatten() for each in gradients if each is not None]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_training_that_runs_out_of_memory_says_where_and_what_to_change(tmp_path: Path, images: ArrayImages) -> None:
    with memory_for(at_most(4)), pytest.raises(OutOfMemory) as caught:
        train(run_of(accumulation=2), images, tmp_path, "abc")
    assert re.fullmatch(
        r"training: memory ran out at level 0, in a part of \d images, with training\.batch 16, accumulation 2,"
        r" activation_checkpointing false and batch_fit false; the machine has [\d.]+ of [\d.]+ GiB free; the worker"
        r" held [\d.]+ GiB at most, where [\d.]+ were estimated; set training\.batch_fit to true, which goes on with"
        r" the same batch in smaller parts, set training\.activation_checkpointing to true, raise"
        r" training\.accumulation, or use a smaller network or a device with more memory\.",
        str(caught.value),
    )
    assert isinstance(caught.value.__cause__.__cause__, torch.OutOfMemoryError), "its frames are in the traceback"


def test_memory_for_not_even_one_image_ends_the_run_with_a_sentence(tmp_path: Path, images: ArrayImages) -> None:
    with memory_for(lambda _: False), pytest.raises(UserError) as caught:
        train(run_of(batch_fit=True, activation_checkpointing=True), images, tmp_path, "abc")
    assert not isinstance(caught.value, OutOfMemory), "which would be tried again"
    assert str(caught.value).startswith("training: even with one image at a time, memory ran out at level 0, in a part")
    assert str(caught.value).endswith("were estimated; use a smaller network or a device with more memory.")


def test_memory_that_runs_out_between_steps_is_said_to(
    tmp_path: Path, images: ArrayImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("dvdp.training.checkpoints.write", write)
    with pytest.raises(OutOfMemory, match=r"^training: memory ran out outside the network's passes"):
        train(run_of(batch_fit=True), images, tmp_path, "abc")


def other_errors_are_not_taken_for_it(_: torch.Tensor) -> bool:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_another_error_ends_a_step_at_once(tmp_path: Path, images: ArrayImages) -> None:
    with memory_for(other_errors_are_not_taken_for_it), pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        train(run_of(batch_fit=True), images, tmp_path, "abc")


def rank(number: int, folder: Path, run: Run, limit: int | None) -> None:
    """Rank 1 has memory for so many images of full size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=number, world_size=2)
    try:
        with memory_for(at_most(limit)) if number == 1 and limit else contextlib.nullcontext():
            train(run, pictures(), folder, "abc")
    finally:
        dist.destroy_process_group()


def two_ranks(folder: Path, run: Run, limit: int | None = None) -> None:
    mp.spawn(rank, (folder, run, limit), nprocs=2)


def test_a_rank_that_runs_out_is_waited_for_by_none_and_all_go_on_in_its_parts(tmp_path: Path) -> None:
    """To the bits of two ranks with these parts from the start, which exchange gradients within the backward pass."""
    two_ranks(tmp_path / "fitting", run_of(batch_fit=True, groups=2), limit=1)
    assert json.loads((tmp_path / "fitting" / FILE).read_text()) == [[0, 1]]
    two_ranks(tmp_path / "parted", run_of(accumulation=8, groups=2))
    assert_same(tmp_path / "fitting", tmp_path / "parted")


def end(number: int, folder: Path, run: Run, limit: int) -> None:
    """Write what it raises beside the folder."""
    with pytest.raises(UserError) as caught:
        rank(number, folder, run, limit)
    (folder.parent / f"{number}.txt").write_text(str(caught.value))


def test_ranks_of_which_one_has_no_memory_for_an_image_raise_the_same_sentence(tmp_path: Path) -> None:
    mp.spawn(end, (tmp_path / "run", run_of(points=(), batch_fit=True, groups=2), -1), nprocs=2)
    said = [(tmp_path / f"{number}.txt").read_text() for number in (0, 1)]
    assert said[0] == said[1]
    assert "at level 0, in a part of 1 image of rank 1, with" in said[0]


#: Its address space is limited to what it has after a first step, and so many MiB.
LIMITED = """
import dataclasses, json, re, resource, sys
from pathlib import Path
import torch
from tests.training.test_fit import pictures
from dvdp.config import Run
from dvdp.out_of_memory import OutOfMemory
from dvdp.training.loop import Training, train

torch.set_num_threads(1)
run, images, folder = Run.from_description(json.loads(sys.stdin.read())), pictures(), Path(sys.argv[1])
first = Training(run, images, folder, "abc", False, torch.device("cpu"), None)
first.update(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [1])
status = Path("/proc/self/status").read_text()
limit = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", status)[1]) + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    train(run, images, folder, "abc")
except OutOfMemory as error:
    print(error)
train(dataclasses.replace(run, training=dataclasses.replace(run.training, batch_fit=True)), images, folder, "abc")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_process_whose_memory_is_limited_finds_the_parts_that_fit(tmp_path: Path, images: ArrayImages) -> None:
    run = run_of(dropout=0.0, points=(), batch=1024, images=1024, checkpoint_images=1024)
    # So that what is freed goes back to the system, also for the code that oneDNN makes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "limited"), "250"],
        input=json.dumps(run.describe()),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("training: memory ran out at level 0, in a part of 1024 images, with training.batch")
    assert " GiB free, and the process may address " in done.stdout
    ((seen, size),) = json.loads((tmp_path / "limited" / FILE).read_text())
    assert seen == 0
    assert 64 < size < 1024
    train(run, images, tmp_path / "whole", "abc")
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("limited", "whole"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
