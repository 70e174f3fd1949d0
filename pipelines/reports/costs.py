"""What settings cost: devices' time, FLOPs, memory and disk, beside what was estimated before the first step."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dvdp.config import Run
from dvdp.models.flops import mean_flops, sample_flops, training_flops, training_images
from dvdp.training import ledger
from dvdp.training.memory import parameter_count
from pipelines.jobs.device import read_machine
from pipelines.jobs.sample import seconds_per_sample
from pipelines.reports.comparison import Result, starts
from pipelines.reports.text_tables import magnitude, si


@dataclass(frozen=True)
class Cost:
    """Of one run, or the means over the seeds of a setting; 0 where it is not known."""

    parameters: float
    training_flops: float
    """Of all passes, forward and backward (three times the forward)."""
    image_flops: float
    """Of a training image, the mean over levels."""
    sample_flops: float
    """Of an image that is drawn, all steps together."""
    training_seconds: float
    """Summed over the run's devices, without previews."""
    estimated_seconds: float
    sampling_seconds: float
    """Summed over devices, without loading."""
    samples_per_second: float
    """Of one worker."""
    memory: float
    """Peak of a training worker, in bytes: of its GPU, else of its process."""
    estimated_memory: float
    disk: float
    """In bytes: checkpoints, weights and samples."""
    estimated_disk: float


def cost(result: Result) -> Cost:
    """What one run took, from its log and its files."""
    job, run = result.job, result.job.run
    said = _estimate(job.folder)
    entries = ledger.read(job.folder / "metrics.jsonl")
    before = [0, *(entry.images for entry in entries)]
    seconds = sum(
        (entry.images - seen) / entry.metrics["images_per_second"] for seen, entry in zip(before, entries, strict=False)
    )
    trained_on = read_machine(job)
    sampled = seconds_per_sample(job) if any(job.samples.glob("*.npy")) else 0.0
    return Cost(
        parameters=parameter_count(run),
        training_flops=training_flops(run),
        image_flops=3 * mean_flops(run),
        sample_flops=sample_flops(run),
        training_seconds=seconds * trained_on.devices,
        estimated_seconds=said.get("seconds", 0) * trained_on.devices,
        sampling_seconds=sampled * run.sampling.count * (1 if trained_on.gpu else job.params.cluster.threads),
        samples_per_second=1 / sampled if sampled else 0.0,
        memory=2**30 * max((entry.metrics.get("memory_gib", 0.0) for entry in entries), default=0.0),
        estimated_memory=said.get("memory_bytes", 0),
        disk=sum(_bytes(place) for place in (job.folder / "checkpoints", job.weights, job.samples)),
        estimated_disk=said.get("disk_bytes", 0),
    )


def costs(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line for each setting, of one run, the means over its seeds."""
    runs = {name: [cost(r) for r in results if r.job.run.setting == name] for name in _settings(results)}
    means = {name: _over(statistics.mean, each) for name, each in runs.items()}
    unit, seconds = _unit(results, max(mean.training_seconds for mean in means.values()))
    size, size_bytes = _size(max(mean.disk for mean in means.values()))
    headings = [
        "setting", "parameters", "training FLOPs", "FLOPs of a training image", "FLOPs of a sample",
        f"training, {unit} (estimated)", f"sampling, {unit}", "samples a second",
        "peak memory, GiB (estimated)", f"disk, {size} (estimated)",
    ]  # fmt: skip
    starts = {result.job.run.setting: result.job.run.start for result in results}
    before = {name: [si(start.flops or 0) if start else "0"] for name, start in starts.items() if any(starts.values())}
    if before:
        headings.insert(3, "training FLOPs before")
    cells = [
        [
            name,
            si(mean.parameters),
            si(mean.training_flops),
            *before.get(name, []),
            si(mean.image_flops),
            si(mean.sample_flops),
            _beside(mean.training_seconds / seconds, mean.estimated_seconds / seconds),
            _number(mean.sampling_seconds / seconds),
            _number(mean.samples_per_second),
            _beside(mean.memory / 2**30, mean.estimated_memory / 2**30),
            _beside(mean.disk / size_bytes, mean.estimated_disk / size_bytes),
        ]
        for name, mean in means.items()
    ]
    return headings, cells


def total(results: Sequence[Result]) -> str:
    """What all runs took together, one sentence."""
    # One training may have several settings.
    trained = {result.job.training_hash: result for result in results}.values()
    spent = _over(sum, [cost(result) for result in trained])
    others = [result for result in results if result not in trained]
    sampling = spent.sampling_seconds + sum(cost(result).sampling_seconds for result in others)
    disk = spent.disk + sum(_bytes(result.job.samples) for result in others)
    unit, seconds = _unit(results, spent.training_seconds)
    size, size_bytes = _size(disk)
    runs = f"{len(results)} runs" if len(results) > 1 else "The run"
    devices = ", ".join(dict.fromkeys(read_machine(result.job).device for result in results))
    return (
        f"{runs} took {_number(spent.training_seconds / seconds)} {unit} of training and"
        f" {_number(sampling / seconds)} of sampling, {si(spent.training_flops)}FLOPs of training and"
        f" {_number(disk / size_bytes)} {size} of disk{f', on {devices}' if devices else ''}."
    )


def budget(results: Sequence[Result]) -> str:
    """Whether settings were trained on equal FLOPs or equal images, one sentence, and one for each other start."""
    every = {result.job.run.setting: result.job.run for result in results}
    begun = starts({name: run.start for name, run in every.items()})
    # Those that started alike: from random weights, if any did.
    start = None if any(run.start is None for run in every.values()) else next(iter(every.values())).start
    alike = [run for run in every.values() if run.start == start]
    those = "" if len(alike) == len(every) else f" that started as {alike[0].setting} did"
    return " ".join([_budget(alike, f"All settings{those}"), *begun])


def _budget(runs: Sequence[Run], who: str) -> str:
    flops, images = [training_flops(run) for run in runs], [training_images(run) for run in runs]
    more, longer = max(flops) / min(flops), max(images) / min(images)
    if len(runs) == 1:
        return f"{runs[0].setting} was trained on {images[0]:,} images, {si(flops[0])}FLOPs."
    if len({(run.training.budget, run.training.images) for run in runs}) > 1:
        return (
            "Settings were trained neither on equal FLOPs nor on equal images, as their own overrides say: the most is"
            f" {more:.2f} times the least FLOPs, and {longer:.2f} times the fewest images."
        )
    if runs[0].training.budget == "flops":
        return (
            f"{who} were trained on equal FLOPs, {si(statistics.mean(flops))}FLOPs each (training.budget:"
            f" flops); as batches are whole, the most is {100 * (more - 1):.2f} % more than the least."
        )
    return (
        f"{who} were trained on equal images, {images[0]:,} each (training.budget: images); the most is"
        f" {more:.2f} times the least FLOPs."
    )


def _settings(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.job.run.setting for result in results))


def _over(function: Callable[[list[float]], float], runs: Sequence[Cost]) -> Cost:
    return Cost(*(function([getattr(run, field.name) for run in runs]) for field in fields(Cost)))


def _unit(results: Sequence[Result], longest: float) -> tuple[str, float]:
    """Name and seconds of the unit that device time is given in."""
    gpu = any(read_machine(result.job).gpu for result in results)
    name, seconds = ("hours", 3600) if longest >= 3600 else ("minutes", 60)
    return f"{'GPU' if gpu else 'core'}-{name}", seconds


def _size(most: float) -> tuple[str, int]:
    """Name and bytes of the unit that files are given in."""
    return ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)


def _number(value: float) -> str:
    """Three digits."""
    return "-" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.{max(0, 2 - magnitude(value))}f}"


def _beside(measured: float, estimated: float) -> str:
    return _number(measured) + (f" ({_number(estimated)})" if estimated else "")


def _estimate(folder: Path) -> dict[str, float]:
    path = folder / "estimate.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _bytes(place: Path) -> int:
    files = place.glob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())
