"""What a training step and a sampler call launch on a GPU, move and compute, counted without one.

    python -m benchmarks.gpu.counts            # compare with benchmarks/results/gpu_counts.json, and fail if more
    python -m benchmarks.gpu.counts --write    # write it anew, and the roofline that follows from it

Three networks in bf16: those of the paper's tables at 32 and 256 px, and the demo's of ``params.yaml``. Of each: a step
with the whole batch at one level, for every level; a step with all levels; optimiser and average alone; and, for every
level, what a sampler does from one function evaluation to the next. Each is broken down by the function of ours that
caused it and the operator; see :mod:`benchmarks.gpu.fake` for how and :mod:`benchmarks.gpu.kernels` for the kernels.
Kernels are those of eager mode, and CUDA graphs launch those of a training step's parts, as they do from the third step
on; torch.compile makes nothing of fake tensors.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.gpu.fake import ROOT, FakeGpu, Line, fake_gpu
from benchmarks.gpu.kernels import Kernel
from benchmarks.gpu.roofline import COUNTS, kernel_seconds, write_roofline
from benchmarks.gpu.steps import PAPER
from benchmarks.steps import make_run
from dvdp.config import Run, TrainingParams, read_params
from dvdp.data.loading import ArrayImages
from dvdp.diffusion.sampling import Progress
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.training import graphs
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

#: Bytes and FLOPs may grow by this share: a tensor of few numbers more is no change of the network.
TOLERANCE = 0.005
#: Of a part, what may not grow.
TOTALS = ("launches", "kernels", "gigabytes", "teraflops", "copies_to_host", "waits")
REWRITE = "python -m benchmarks.gpu.counts --write"
GPU = torch.device("cuda:0")


@dataclass(frozen=True)
class Network:
    """A run whose steps are counted, and the images of one sampler call."""

    run: Run
    sampled: int


def networks() -> dict[str, Network]:
    """The three, by name."""
    found = {}
    for resolution in (256, 32):
        batch, sampled, points, model = PAPER[resolution]
        training = TrainingParams(batch=batch, optimizer="adamw", precision="bf16")
        found[f"{resolution} px"] = Network(make_run(points, resolution, model, training), sampled)
    demo = read_params(ROOT / "params.yaml").run("dvdp-300-600", 0)
    demo = replace(demo, training=replace(demo.training, precision="bf16"))
    return found | {"demo": Network(demo, demo.sampling.batch)}


def count(network: Network, each_level: bool = True) -> dict[str, Any]:
    """Everything of one network: what it is, and its parts.

    Args:
        each_level: also steps of one level, which do what steps of all levels do, in other batches.
    """
    run = network.run
    parts: dict[str, Any] = {}
    batch, levels = run.training.batch, len(run.turning_points) + 1
    pixels = np.zeros((1, 3, run.resolution, run.resolution), np.uint8)
    about = {"label_counts": [*[1] * run.model.num_classes, 0], "band_std": [0.1] * levels}
    # A part is captured when it first comes, as the second time would be the same.
    with fake_gpu() as gpu, mock.patch.object(graphs, "RUNS_BEFORE", 0):
        training = Training(run, ArrayImages(pixels), Path(), "counts", False, GPU, None, about)
        images = torch.zeros((batch, *pixels.shape[1:]), dtype=torch.uint8).to(GPU)
        labels = torch.zeros(batch, dtype=torch.long).pin_memory()

        def step(counts: list[int]) -> None:
            training.update(images, counts, labels)
            training.ema.update(100_000, batch)

        def optimise() -> None:
            for optimizer in training.optimizers:
                optimizer.step()
            training.ema.update(100_000, batch)

        alone = [[batch if k == level else 0 for k in range(levels)] for level in range(levels)]
        # Before it is counted: tables and moments are made by the first step.
        step(alone[-1])
        works: dict[str, Callable[[], None]] = {
            f"step, level {level}": lambda counts=counts: step(counts)  # type: ignore[misc]
            for level, counts in enumerate(alone)
            if each_level
        }
        works["step, all levels"] = lambda: step(level_counts(training.process.schedule, "all", 0, 0, batch))
        works["optimiser and average"] = optimise
        for name, work in works.items():
            if work is not optimise:
                work()
            gpu.reset()
            work()
            parts[name] = summary(gpu)
        if each_level:
            parts |= {f"step, level {level}": without_rows(parts[f"step, level {level}"]) for level in range(1, levels)}

        def between(progress: Progress) -> None:
            # From the first evaluation of a level to its second: what it takes, without the tables and the lift.
            found = summary(gpu)
            parts[f"sampler call, level {progress.level}"] = without_rows(found) if progress.level else found
            gpu.reset()

        options = {**run.sampling.options(), "steps": 2 * levels, "share": (2,) * levels, "batch": network.sampled}
        training.model.draw(network.sampled, options=options, callback=between)
    return {
        "batch": batch,
        "sampled": network.sampled,
        "turning_points": list(run.turning_points),
        "optimizer": run.training.optimizer,
        "parts": parts,
    }


def summary(gpu: FakeGpu) -> dict[str, Any]:
    """What was noted since the last reset: totals, copies and waits of the ``host``, ``by`` function and operator.

    Where a CUDA graph launches kernels, ``launches`` of the host are fewer than these.
    """
    rows: dict[str, list[float]] = {}
    for kernel, line, _ in gpu.launches:
        row = rows.setdefault(row_name(kernel, line), [0, 0.0, 0.0, 0.0])
        row[0] += kernel.launches
        row[1] += (kernel.read + kernel.written) / 1e9
        row[2] += kernel.flops / 1e12
        row[3] += 1e3 * kernel_seconds(kernel)
    host = [f"{copy.line.function}: copy to the host" for copy in gpu.copies if copy.to_host]
    host += [f"{wait.line.function}: waits, {wait.what}" for wait in gpu.waits]
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    return {
        "launches": gpu.launched,
        "kernels": int(totals[0]),
        "gigabytes": round(totals[1], 3),
        "teraflops": round(totals[2], 4),
        "copies_to_host": sum(copy.to_host for copy in gpu.copies),
        "waits": len(gpu.waits),
        "gpu_milliseconds": round(totals[3], 3),
        "host": dict(sorted(Counter(host).items())),
        "by": {
            name: [int(launches), round(gigabytes, 4), round(teraflops, 5), round(milliseconds, 4)]
            for name, (launches, gigabytes, teraflops, milliseconds) in sorted(
                rows.items(), key=lambda row: (-row[1][3], row[0])
            )
        },
    }


def without_rows(found: dict[str, Any]) -> dict[str, Any]:
    """For the other levels, whose functions and operators are those of level 0."""
    return {key: value for key, value in found.items() if key != "by"}


def row_name(kernel: Kernel, line: Line) -> str:
    """E.g. ``dvdp/models/unet.py ResidualBlock.forward, backward: silu_backward, bfloat16``; it stays as code moves."""
    backward = ", backward" if line.backward else ""
    return f"{line.function}{backward}: {kernel.operator}, {str(kernel.dtype).removeprefix('torch.')}"


class Changes(NamedTuple):
    """Between two counts, in words; both are empty where nothing changed."""

    grown: list[str]
    """Parts that launch, move, compute, copy to the host or wait more, each followed by what in it does."""
    shrunk: list[str]
    """Parts that do none of this more, and some of it less."""

    def __str__(self) -> str:
        if self.grown:
            lines = "\n".join(self.grown)
            return (
                "A step or a sampler call does more on a GPU than its baseline says; take it back, or say why in the"
                f" commit and write the baseline with `{REWRITE}`.\n{lines}"
            )
        if self.shrunk:
            return f"Less than the baseline says: {'; '.join(self.shrunk)}; write it with `{REWRITE}`."
        return "As the baseline says."


def compare(found: Mapping[str, Any], baseline: Mapping[str, Any]) -> Changes:
    """What changed between the ``networks`` of two records; of ``found``, some may be left out.

    Raises:
        UserError: the baseline has no such network or part.
    """
    changes = Changes([], [])
    for name, network in found.items():
        for part, now in network["parts"].items():
            then = baseline.get(name, {"parts": {}})["parts"].get(part)
            if then is None:
                raise UserError(f"{name}, {part}: found no baseline, expected one; write it with `{REWRITE}`.")
            more = [total for total in TOTALS if now[total] > _allowed(total, then[total])]
            if more:
                said = ", ".join(f"{total} {then[total]:g} -> {now[total]:g}" for total in more)
                changes.grown.append(f"{name}, {part}: {said}")
                changes.grown.extend(_rows_grown(now.get("by", {}), then.get("by", {})))
                changes.grown.extend(
                    f"    {what}: {then['host'].get(what, 0)} -> {number}"
                    for what, number in now["host"].items()
                    if number > then["host"].get(what, 0)
                )
            elif any(_allowed(total, now[total]) < then[total] for total in TOTALS):
                changes.shrunk.append(f"{name}, {part}")
    return changes


def _allowed(total: str, value: float) -> float:
    return value * (1 + TOLERANCE) if total in ("gigabytes", "teraflops") else value


def _rows_grown(now: Mapping[str, list[float]], then: Mapping[str, list[float]]) -> list[str]:
    """Functions with operators that launch, move or compute more."""
    grown = []
    for name, (launches, gigabytes, teraflops, _) in now.items():
        before = then.get(name, [0, 0.0, 0.0, 0.0])
        if launches > before[0] or gigabytes > _allowed("gigabytes", before[1]) or teraflops > before[2] * 1.005:
            grown.append(
                f"    {name}: {before[0]} -> {launches} launches, {before[1]:g} -> {gigabytes:g} GB,"
                f" {before[2]:g} -> {teraflops:g} TFLOP"
            )
    return grown


def torch_release() -> str:
    """Another release of torch may take other kernels."""
    return ".".join(torch.__version__.split(".")[:2])


def main() -> int:
    """Count, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="the baseline anew, and the roofline")
    options = parser.parse_args()
    shown = tqdm(networks().items(), desc="count", unit="network", disable=None)
    found = {name: count(network) for name, network in shown}
    if options.write:
        record = {"torch": torch_release(), "precision": "bf16", "networks": found}
        # A row a line.
        text = re.sub(r"\[[^][{}\"]*\]", lambda row: json.dumps(json.loads(row[0])), json.dumps(record, indent=1))
        write_atomically(COUNTS, text + "\n")
        write_roofline(record)
        return 0
    changes = compare(found, json.loads(COUNTS.read_text())["networks"])
    print(changes)
    return 1 if changes.grown else 0


if __name__ == "__main__":
    sys.exit(main())
