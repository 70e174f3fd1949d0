"""What a larger batch in as many parts does: DDPM's parts stay as they are, those of the lower levels grow.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.level_batch --out benchmarks/results/level_batch.json

The networks of :mod:`benchmarks.steps`, with its batch, and with 4 times that batch in 4 parts of DDPM's, which are
fewer at the lower levels (:func:`dvdp.training.levels.parts`). Each setting's steps take turns; the memory is what one
takes beside weights, moments and average.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baseline import TURNS
from benchmarks.machine import machine
from benchmarks.steps import PRECISIONS, SIZES, TOY, TURNING_POINTS, bound, make_run, start, step
from benchmarks.timing import peak_memory, spreads, times_in_turns, warn_of_allocator
from dvdp.config import TrainingParams
from dvdp.files import write_atomically
from dvdp.models.flops import level_flops
from dvdp.training.levels import level_counts

#: Parts of DDPM's batch, each of as many images.
PARTS = (1, 4)
CPU = torch.device("cpu")


def main() -> int:
    """Measure each resolution and precision, write what was found, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=[*SIZES, *TOY], default=[32, 64])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warn_of_allocator(CPU)
    result: dict[str, Any] = {"machine": machine(), "seconds_of": "processor time", "turns": options.turns}
    result |= {"cases": [], "ratios": {}, "spreads": {}}
    for resolution in options.resolutions:
        for precision in PRECISIONS:
            case, between_turns = measure(resolution, precision, options.turns)
            result["cases"].append(case)
            result["ratios"] |= ratios(case)
            result["spreads"] |= between_turns
            write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0


def measure(resolution: int, precision: str, turns: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds and memory of steps at one resolution and precision, by what they train; the spreads of the ratios."""
    at_once, model = {**SIZES, **TOY}[resolution]
    works: dict[str, Callable[[], None]] = {}
    for accumulation in PARTS:
        batch = at_once * accumulation
        pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, resolution, resolution), dtype=np.uint8)
        images = torch.from_numpy(pixels)
        settings = TrainingParams(
            batch=batch,
            accumulation=accumulation,
            optimizer="adamw",
            precision=precision,  # type: ignore[arg-type]
        )
        ddpm, dvdp = (
            start(make_run(points, resolution, model, settings), pixels, CPU) for points in ((), TURNING_POINTS)
        )
        for run in (ddpm, dvdp):
            # The optimiser's moments are there before memory is measured.
            step(run, images[:1], [1, *[0] * run.process.levels])
        schedule = dvdp.process.schedule
        steps = {"ddpm": (ddpm, [batch]), "all levels": (dvdp, level_counts(schedule, "all", 0, 0, batch))}
        for level in range(schedule.levels + 1):
            steps[f"level {level}"] = (dvdp, [batch if k == level else 0 for k in range(schedule.levels + 1)])
        works |= {
            f"{name}, {accumulation}": partial(step, run, images, counts) for name, (run, counts) in steps.items()
        }
    # This warms up, too.
    memory = {name: peak_memory(work, CPU) / 2**30 for name, work in works.items()}
    # Measuring memory gave it back; the first to take it again would be slower.
    next(iter(works.values()))()
    times = times_in_turns(list(works.values()), turns, CPU, f"{resolution} px, {precision}", warm_up=0)
    case: dict[str, Any] = {
        "resolution": resolution,
        "precision": precision,
        "batch": at_once,
        "shares": schedule.shares(),
        "bound": bound(level_flops(dvdp.run), schedule.shares()),
        "memory_gib": memory,
    }

    def seconds(turns: list[tuple[float, ...]]) -> dict[str, Any]:
        medians = map(statistics.median, zip(*turns, strict=True))
        return {"seconds": dict(zip(works, medians, strict=True))}

    return case | seconds(times), spreads([ratios(case | seconds([turn])) for turn in times])


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """DDPM over DVDP; what must not fall, by name."""
    seconds, found = case["seconds"], {}
    for parts in PARTS:
        one = sum(share * seconds[f"level {level}, {parts}"] for level, share in enumerate(case["shares"]))
        for draw, of_dvdp in (("one level", one), ("all levels", seconds[f"all levels, {parts}"])):
            batch = f"{parts} x {case['batch']} images"
            name = f"{case['resolution']} px, {case['precision']}, training, DDPM over DVDP, {draw} a step, {batch}"
            found[name] = seconds[f"ddpm, {parts}"] / of_dvdp
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: DDPM over DVDP, and memory, by the batch."""
    lines = [
        "| px | | images a step | `all` | `one` | bound | GiB: DDPM | `all` | `one` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        found, memory = list(ratios(case).values()), case["memory_gib"]
        for parts, one, every in zip(PARTS, found[::2], found[1::2], strict=True):
            most = max(memory[f"level {level}, {parts}"] for level in range(len(case["shares"])))
            gib = " | ".join(f"{m:.2f}" for m in (memory[f"ddpm, {parts}"], memory[f"all levels, {parts}"], most))
            batch = f"{parts} x {case['batch']}"
            speed = f"{every:.2f}x | {one:.2f}x | {case['bound']:.2f}x"
            lines.append(f"| {case['resolution']} | {case['precision']} | {batch} | {speed} | {gib} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
