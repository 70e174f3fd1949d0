"""``dvdp check``: what every setting will take, and what of it does not fit, before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dvdp import hardware
from dvdp.config import Params, Run
from dvdp.errors import UserError, did_you_mean
from dvdp.files import write_atomically
from dvdp.identity import trained_as
from dvdp.models.flops import level_flops, relative_flops, sample_flops, training_flops, training_images
from dvdp.training.memory import checkpoint_bytes, parameter_count, run_bytes, worker_memory
from pipelines.jobs.paths import DataPaths
from pipelines.reports.text_tables import as_text
from pipelines.starts import fetch_starts

if TYPE_CHECKING:
    from pipelines.commands.trial import Trial

GIB = 2**30
#: Share of a GPU's peak that training reached: 2.5e9 images of a UNet of 208 GFLOPs forward in 13 days on 32 A100, by
#: the README of https://github.com/NVlabs/edm, are 43 TFLOP/s of 312.
UTILISATION = 0.14
TRIALS = "trials.json"


@dataclass(frozen=True)
class Gpu:
    """From its data sheet."""

    tflops: float
    """Peak in bf16, dense; half of it in TF32, which convolutions in fp32 run in."""
    gib: float


GPUS = {
    "A100-40GB": Gpu(312, 40),
    "A100-80GB": Gpu(312, 80),
    "H100": Gpu(989, 80),
    "H200": Gpu(989, 141),
    "L4": Gpu(121, 24),
    "RTX-4090": Gpu(165, 24),
}


@dataclass(frozen=True)
class Cost:
    """Of one setting and seed."""

    run: Run
    training_hours: float | None
    """On all its ranks together; None if no rate is known."""
    sampling_hours: float | None
    """On one worker."""
    memory: int
    """Peak of one worker, in bytes."""
    disk: int
    """Checkpoints, weights and samples, in bytes."""

    def device_hours(self, ranks: int) -> float | None:
        """Of all ranks while training, and of one worker's sampling."""
        if self.training_hours is None or self.sampling_hours is None:
            return None
        return self.training_hours * ranks + self.sampling_hours


def check(params: Params, gpu: str | None, price: float | None, trial: bool) -> str:
    """A table with a row for each setting, its totals, and sentences on what it assumes and on what does not fit.

    Args:
        gpu: name in :data:`GPUS`, or of a device with a stored trial, in place of this machine.
        price: of an hour of one worker's device.
        trial: time a few steps of every setting here, and keep what they took beside the runs.

    Raises:
        UserError: there is no such GPU, or one is named beside ``trial``.
    """
    if trial and gpu:
        raise UserError(
            "--trial: found it beside --gpu, expected one or the other, as steps are timed on this machine."
        )
    if gpu:
        # So that precision auto is what the GPU has.
        params = dataclasses.replace(params, cluster=dataclasses.replace(params.cluster, gpu=True))
    params = fetch_starts(params)
    runs = list({run.setting: run for run in reversed(params.runs())}.values())[::-1]
    begun = [_start(run) for run in runs if run.training.start is not None]
    trials = _trials(params, runs, trial, gpu)
    if gpu and gpu not in GPUS and not any(trials):
        names = [*GPUS, *sorted({entry["device"] for entry in _stored(params).values()})]
        raise UserError(f"--gpu: found '{gpu}'{did_you_mean(gpu, names)}, expected one of {', '.join(names)}.")
    costs = [_cost(run, found, params, gpu) for run, found in zip(runs, trials, strict=True)]
    headings, cells = _table(costs, params, price)
    lines = [as_text(headings, cells), ""] if costs else []
    lines += [*_assumptions(costs, trials, params, gpu, price), *begun, *_shared(runs)]
    lines += [line for run, found in zip(runs, trials, strict=True) if found for line in _parts(run, found, params)]
    return "\n".join([*lines, *_misfits(costs, params, gpu)])


def _shared(runs: Sequence[Run]) -> list[str]:
    """A sentence for every training that several settings have."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(json.dumps([trained_as(run), run.training.start], sort_keys=True), []).append(run.setting)
    return [
        f"{' and '.join(names)} have one training, done once; the totals count it for each."
        for names in groups.values()
        if len(names) > 1
    ]


def _start(run: Run) -> str:
    """What a setting starts from; raises UserError where it cannot."""
    # It imports torch.
    from dvdp.training.start import with_start

    start = with_start(run).start
    assert start is not None
    return (
        f"{run.setting} starts from '{run.training.start}' (SHA-256 {start.sha256[:12]}), weights of"
        f" {start.setting} that have seen {start.seen}: no column counts these."
    )


def _cost(run: Run, trial: Trial | None, params: Params, gpu: str | None) -> Cost:
    ranks = params.cluster.num_workers
    memory = trial.memory_bytes if trial else worker_memory(run, ranks, params.cluster.gpu, params.cluster.shard)
    images, count = training_images(run), run.sampling.count
    seconds: tuple[float | None, float | None] = (None, None)
    if trial:
        seconds = (trial.step_seconds * images / run.training.batch, trial.sample_seconds * count)
    elif gpu:
        rate = GPUS[gpu].tflops * 1e12 * UTILISATION * (1 if run.training.precision == "bf16" else 0.5)
        seconds = (training_flops(run) / rate / ranks, count * sample_flops(run) / rate)
    training, sampling = (None if each is None else each / 3600 for each in seconds)
    return Cost(run, training, sampling, memory, run_bytes(run))


def _table(costs: Sequence[Cost], params: Params, price: float | None) -> tuple[list[str], list[list[str]]]:
    ranks, seeds = params.cluster.num_workers, len(params.seeds)
    headings = ["setting", "images", "FLOPs", "per image", "parameters", "training h", "sampling h", "GiB", "disk GiB"]
    if price is not None:
        headings.append("price")

    def hours(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    def paid(device_hours: float | None) -> list[str]:
        return [] if price is None else ["-" if device_hours is None else f"{price * device_hours:,.2f}"]

    cells = [
        [
            cost.run.setting,
            f"{training_images(cost.run):,}",
            f"{training_flops(cost.run):.2e}",
            f"{relative_flops(cost.run):.2f}x",
            f"{parameter_count(cost.run):,}",
            hours(cost.training_hours),
            hours(cost.sampling_hours),
            f"{cost.memory / GIB:.2f}",
            f"{cost.disk / GIB:.3f}",
            *paid(cost.device_hours(ranks)),
        ]
        for cost in costs
    ]

    def total(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return seeds * sum(known) if len(known) == len(values) else None

    cells.append(
        [
            f"all, {seeds} seed{'s' if seeds > 1 else ''}",
            f"{seeds * sum(training_images(cost.run) for cost in costs):,}",
            f"{seeds * sum(training_flops(cost.run) for cost in costs):.2e}",
            "",
            "",
            hours(total([cost.training_hours for cost in costs])),
            hours(total([cost.sampling_hours for cost in costs])),
            f"{max((cost.memory for cost in costs), default=0) / GIB:.2f}",
            f"{seeds * sum(cost.disk for cost in costs) / GIB:.3f}",
            *paid(total([cost.device_hours(ranks) for cost in costs])),
        ]
    )
    return headings, cells


def _assumptions(
    costs: Sequence[Cost], trials: Sequence[Trial | None], params: Params, gpu: str | None, price: float | None
) -> list[str]:
    ranks = params.cluster.num_workers
    precisions = ", ".join(sorted({cost.run.training.precision for cost in costs}))
    lines = [
        f"Precision: {precisions}. A row is one seed; 'per image' is the FLOPs of a training image over DDPM's, and"
        " FLOPs are those of three forward passes.",
        f"GiB is the peak of one of {ranks} workers" + (", on its GPU." if params.cluster.gpu else "."),
    ]
    if all(trials):
        device = trials[0].device if trials and trials[0] else ""
        lines.append(
            f"Hours and GiB: from a trial of a few steps on {device}, with nothing else at work; without previews,"
            " scores and the start of processes."
        )
    elif gpu:
        lines.append(
            f"Hours and GiB: not measured. Hours are at {100 * UTILISATION:.0f} % of the peak of {gpu},"
            f" {GPUS[gpu].tflops:g} TFLOP/s in bf16 and half of that in fp32, a share that NVlabs/edm measured on A100,"
            f" of a network of 208"
            f" GFLOPs an image; one of {min(level_flops(costs[0].run)) / 1e9:.2g} to"
            f" {max(level_flops(costs[0].run)) / 1e9:.2g}, as here, takes longer if it is far smaller."
            " `dvdp check --trial` on that machine measures them."
        )
    else:
        lines.append("Hours: no rate is known for these settings on this machine; `dvdp check --trial` measures them.")
    if not params.cluster.gpu and not all(trials):
        lines.append("GiB: counted; eleven small runs on a CPU took within 5 % of that.")
    if price is not None:
        lines.append(f"Price: {price:g} for an hour of one worker's device, training on {ranks} and sampling.")
    lines.append(_store_sentence(params))
    lines += [
        f"{name}: its turning points are chosen once the data set is prepared, see `dvdp plan`."
        for name, setting in params.settings.items()
        if isinstance(setting.turning_points, str)
    ]
    return lines


def _parts(run: Run, trial: Trial, params: Params) -> list[str]:
    """What a trial says of parts of a step."""
    if not trial.part or not trial.largest_part:
        return []
    images = math.ceil(run.training.batch / params.cluster.num_workers)
    asked = math.ceil(images / run.training.accumulation)
    accumulation = math.ceil(images / trial.largest_part)
    many = f"{trial.largest_part} image{'s' if trial.largest_part > 1 else ''} of full size"
    how = f"counted from the memory of parts of at most {trial.part}" if trial.counted else f"tried on {trial.device}"
    lines = [f"{run.setting}: the largest part that fits: {many} (training.accumulation: {accumulation}), {how}."]
    if trial.part < asked:
        lines.append(
            f"Does not fit: {run.setting} has no memory for parts of {asked} images; hours and GiB are of parts of"
            f" {trial.part}. Set training.accumulation to {accumulation}, or training.batch_fit to true."
        )
    return lines


def _store_sentence(params: Params) -> str:
    store = DataPaths.of(params).store
    if store.is_dir():
        size = sum(path.stat().st_size for path in store.iterdir())
        return f"Disk GiB: checkpoints, weights and samples. The store in '{store}' takes {size / GIB:.3f} GiB."
    each = image_bytes(params.dataset.resolution)
    bound = "" if params.dataset.encoding == "raw" else "at most "
    return (
        f"Disk GiB: checkpoints, weights and samples. The store, not prepared yet, will take {bound}{each:,} bytes an"
        f" image: {bound}{1000 * each / GIB:.3f} GiB for 1,000."
    )


def image_bytes(resolution: int) -> int:
    """What the store takes for a raw image: pages of LMDB, its place in their tree, and the digest."""
    page, value = 4096, 3 * resolution**2 + 4
    if value > page // 2 - 64:
        return -(-(value + 16) // page) * page + 28 + 32
    # Whole records in a page.
    return page // ((page - 16) // (value + 18)) + 32


def _misfits(costs: Sequence[Cost], params: Params, gpu: str | None) -> list[str]:
    """A sentence for everything that does not fit."""
    lines, seeds, ranks = [], len(params.seeds), params.cluster.num_workers
    if gpu in GPUS or not params.cluster.gpu:
        there, place = (GPUS[gpu].gib * GIB, gpu) if gpu in GPUS else (hardware.memory(), "this machine")
        for cost in costs:
            needed = cost.memory * (1 if gpu else ranks)
            if needed > there:
                lines.append(
                    f"Does not fit: {cost.run.setting} needs {needed / GIB:.1f} GiB of memory, and {place} has"
                    f" {there / GIB:.1f}; raise training.accumulation, set training.activation_checkpointing, or lower"
                    " training.batch."
                )
    # While one checkpoint is written, the one it replaces is still there.
    disk = sum(seeds * (cost.disk) + checkpoint_bytes(cost.run) for cost in costs)
    storage = params.cluster.storage.resolve()
    folder = next(path for path in (storage, *storage.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if disk > free:
        lines.append(
            f"Does not fit: all runs take {disk / GIB:.1f} GiB of disk, and '{folder}' has {free / GIB:.1f} free; lower"
            " training.keep_checkpoints or sampling.count, or name another cluster.storage."
        )
    return lines


def _trials(params: Params, runs: Sequence[Run], measure: bool, gpu: str | None) -> list[Trial | None]:
    """Those that are stored for this machine, or for a GPU of that name; with ``measure`` made now, and stored."""
    from dvdp.hardware import device_name
    from pipelines.commands.trial import Trial, trial_of

    stored = _stored(params)
    if not stored and not measure:
        return [None] * len(runs)
    found: list[Trial | None] = []
    for run in runs:
        if measure:
            trial = trial_of(run, params, DataPaths.of(params).store)
            stored[_key(run, params, trial.device)] = dataclasses.asdict(trial)
            write_atomically(params.cluster.storage / TRIALS, json.dumps(stored, indent=2) + "\n")
        named = {entry["device"] for entry in stored.values() if gpu and gpu.lower() in entry["device"].lower()}
        keys = [_key(run, params, device) for device in (sorted(named) if gpu else [device_name(params.cluster.gpu)])]
        found.append(next((Trial(**stored[key]) for key in keys if key in stored), None))
    return found


def _stored(params: Params) -> dict[str, dict[str, Any]]:
    path = params.cluster.storage / TRIALS
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise UserError(f"check: '{path}' is no JSON, expected what `dvdp check --trial` wrote; delete it.") from None


def _key(run: Run, params: Params, device: str) -> str:
    """Names all that the time of a step depends on."""
    operational = {
        "images", "budget", "checkpoint_images", "keep_checkpoints", "log_images", "preview_images", "batch_fit",
        "label_dropout", "start",
    }  # fmt: skip
    training = {k: v for k, v in dataclasses.asdict(run.training).items() if k not in operational}
    if not run.at_all_timesteps:
        del training["span"]
    left_out = {"count", "seed"} | run.sampling.off
    sampling = {k: v for k, v in dataclasses.asdict(run.sampling).items() if k not in left_out}
    content: list[Any] = [
        run.turning_points,
        run.process,
        run.resolution,
        run.schedule.timesteps,
        dataclasses.asdict(run.model),
    ]
    content += [training, sampling, params.cluster.num_workers, params.cluster.threads, device]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
