"""Training steps and samples at the paper's protocol: what is measured of them on a GPU, and the goals.

Batches are the paper's: 128 images to train, 256 to sample at 32 px, 24 and 64 at 256 px, in bf16. Of
``training.levels: all``, what is measured is the first step; others may have an image of a level more or less.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch

from benchmarks.steps import step
from benchmarks.timing import peak_memory, seconds, take_turns
from dvdp.config import ModelParams
from dvdp.diffusion.timesteps import share_steps
from dvdp.models.flops import level_flops
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

#: Side -> images a training step, images a sampling call, turning points, network: those of presets/.
PAPER = {
    32: (
        128,
        256,
        (600,),
        ModelParams(
            prediction_type="epsilon",
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=3,
            attention_factors=(2, 4),
            num_head_channels=64,
            dropout=0.3,
            num_classes=0,
        ),
    ),
    256: (
        24,
        64,
        (300, 600),
        ModelParams(
            prediction_type="epsilon",
            model_channels=128,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention_factors=(8, 16, 32),
            num_head_channels=64,
            num_classes=0,
        ),
    ),
}
#: *channels_last*: eager, with weights in that layout; *compiled*: so too, by torch.compile.
MODES = ("eager", "compiled")
#: Steps in one piece of work that is timed.
REPEATS = 5
SAMPLE_STEPS = 10
#: At 256 px on one H200, of what :func:`summary` says of a mode.
GOALS = {
    "seconds of an iteration": ("at most", 0.06),
    "TFLOP/s at level 0": ("at least", 300.0),
    "training, ddpm over dvdp, one level a step": ("at least", 2.4),
}


class TimeIsUp(BaseException):
    """No seconds are left; like an interrupt from the keyboard, for nobody on the way to catch."""


class Work(NamedTuple):
    """A training step, or samples."""

    do: Callable[[], object]
    teraflops: float
    repeats: int
    """In one piece that is timed."""


@contextlib.contextmanager
def limited(time_left: float) -> Iterator[None]:
    """Within it, TimeIsUp is raised after so many seconds, also amid a compilation; at once if there are none."""

    def stop(*_: object) -> NoReturn:
        raise TimeIsUp

    if time_left <= 0:
        raise TimeIsUp
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, time_left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def training_works(ddpm: Training, dvdp: Training, images: torch.Tensor, repeats: int) -> dict[str, Work]:
    """Steps, by name, in this order: a run cut short has the parts of the ratios first.

    Args:
        images: of a training step, uint8 (b, 3, side, side), on the device.
        repeats: steps in one piece of work that is timed.
    """
    batch, schedule, flops = len(images), dvdp.process.schedule, level_flops(dvdp.run)
    levels = range(schedule.levels + 1)
    spreads = {f"level {level}": [batch if k == level else 0 for k in levels] for level in levels}
    spreads["all levels"] = level_counts(schedule, "all", 0, 0, batch)

    def teraflops(counts: Sequence[int]) -> float:
        return sum(n * cost for n, cost in zip(counts, flops, strict=True)) / 1e12

    works = {"training, ddpm": Work(partial(step, ddpm, images, [batch]), 3 * teraflops(spreads["level 0"]), repeats)}
    for name, counts in spreads.items():
        works[f"training, {name}"] = Work(partial(step, dvdp, images, counts), 3 * teraflops(counts), repeats)
    return works


def sampling_works(ddpm: Training, dvdp: Training, batch: int) -> dict[str, Work]:
    """Images in :data:`SAMPLE_STEPS` steps, by name, drawn as previews and samples of a run are."""
    works = {}
    for name, training in (("ddpm", ddpm), ("dvdp", dvdp)):
        calls = share_steps(training.process.schedule, SAMPLE_STEPS)
        cost = sum(n * each for n, each in zip(calls, level_flops(training.run), strict=True)) * batch / 1e12
        options = {**training.run.sampling.options(SAMPLE_STEPS), "batch": batch}
        works[f"sampling, {name}"] = Work(partial(training.model.draw, batch, options=options), cost, 1)
    return works


def measure(work: Work, title: str, turns: int, peak: float, device: torch.device) -> dict[str, float]:
    """Seconds of a step, or of samples in :data:`SAMPLE_STEPS` steps, and what follows from them.

    Args:
        peak: TFLOP/s that the machine shows.
    """

    def often() -> None:
        for _ in range(work.repeats):
            work.do()

    first = seconds(work.do, device)
    (median,) = take_turns([often], turns, device, title)
    speed = work.teraflops * work.repeats / median
    return {
        "seconds": median / work.repeats,
        "first_seconds": first,
        "tflops_per_second": speed,
        "share_of_peak": speed / peak,
        "memory_gib": peak_memory(work.do, device) / 2**30,
    }


def summary(
    measured: Mapping[str, Mapping[str, float]], shares: Sequence[float], sample_batch: int
) -> dict[str, float]:
    """What a mode's measurements amount to, as far as its parts are there.

    An iteration is DVDP's at the paper's protocol: one level a step, the mean over the levels' shares.
    """
    took = {name: found["seconds"] for name, found in measured.items()}
    levels = [f"training, level {level}" for level in range(len(shares))]
    found = {}
    if "training, level 0" in measured:
        found["TFLOP/s at level 0"] = measured["training, level 0"]["tflops_per_second"]
    if took.keys() >= {"training, ddpm", *levels}:
        one = sum(share * took[level] for share, level in zip(shares, levels, strict=True))
        found["seconds of an iteration"] = one
        found["training, ddpm over dvdp, one level a step"] = took["training, ddpm"] / one
    if took.keys() >= {"training, ddpm", "training, all levels"}:
        found["training, ddpm over dvdp, all levels a step"] = took["training, ddpm"] / took["training, all levels"]
    for name in ("ddpm", "dvdp"):
        if f"sampling, {name}" in took:
            each = took[f"sampling, {name}"] / SAMPLE_STEPS / sample_batch
            found[f"seconds of an image of 1,000 steps, {name}"] = 1000 * each
    if took.keys() >= {"sampling, ddpm", "sampling, dvdp"}:
        found["sampling, ddpm over dvdp"] = took["sampling, ddpm"] / took["sampling, dvdp"]
    return found


def goals(found: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Of :data:`GOALS`, those that were measured: the goal, what was found, and whether it is met."""
    return {
        name: {
            "goal": f"{resolution} {value:g}",
            "found": found[name],
            "met": found[name] <= value if resolution == "at most" else found[name] >= value,
        }
        for name, (resolution, value) in GOALS.items()
        if name in found
    }
