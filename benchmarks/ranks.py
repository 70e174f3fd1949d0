"""What several ranks keep of the speed-up: our draws of levels beside ranks that draw for themselves.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.ranks --steps benchmarks/results/steps.json --measure --out benchmarks/results/ranks.json

Computed for 1, 8 and 64 ranks from the seconds of each level that ``benchmarks.steps`` measured: ranks wait for each
other in every step, so the slowest level drawn by any of them solvers. Exchanging gradients is left out; it costs all
alike. ``--measure`` runs one rank, and two of gloo, on this machine, one thread each, for some five minutes; as ranks
wait, seconds are of wall-clock time there. What is kept is always of DDPM's own step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.machine import machine
from benchmarks.steps import SIZES, TOY, TURNING_POINTS, bound, make_run, start, step
from benchmarks.timing import spreads, warn_of_allocator
from dvdp.config import TrainingParams
from dvdp.files import write_atomically
from dvdp.models.flops import level_flops
from dvdp.training.levels import level_counts

RANKS = (1, 8, 64)
#: Steps that are drawn to compute what ranks wait for each other.
DRAWS = 4_000
#: Side -> images a step and rank, of what is measured: at 64 px half of benchmarks.steps', or it would take long.
BATCHES = {16: 10, 32: 20, 64: 10}
MEASURED_RANKS = (1, 2)


def main() -> None:
    """Compute, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, required=True, help="result of benchmarks.steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument(
        "--resolutions", type=int, nargs="+", choices=list(BATCHES), default=[32, 64], help="to measure"
    )
    parser.add_argument("--turns", type=int, default=3, help="of what is measured")
    options = parser.parse_args()
    cases = json.loads(options.steps.read_text())["cases"]
    resolutions = options.resolutions if options.measure else []
    result: dict[str, Any] = {
        "machine": machine(),
        "computed": [computed(case, p) for case in cases for p in case["sampling_seconds_per_call"]],
        "measured": [],
        "ratios": {},
        "spreads": {},
        "left_out": {
            f"{resolution} px, ": "not measured in this run" for resolution in BATCHES if resolution not in resolutions
        },
    }
    if resolutions:
        warn_of_allocator(torch.device("cpu"))
    for resolution in resolutions:
        for ranks in MEASURED_RANKS:
            case, between_turns = measured(resolution, ranks, options.turns)
            result["measured"].append(case)
            result["ratios"] |= ratios(case)
            result["spreads"] |= between_turns
    text = json.dumps(result, indent=2) + "\n"
    if options.out:
        write_atomically(options.out, text)
    print(text)


def computed(case: dict[str, Any], precision: str) -> dict[str, Any]:
    """Share of the FLOP bound that each way to draw levels keeps, by the number of ranks."""
    seconds = case["training_seconds"]
    levels = [seconds[f"{precision} level {level}"] for level in range(len(case["shares"]))]
    shares, batch = case["shares"], case["batch"]
    ours = {
        "ours, all": seconds[f"{precision} all levels"],
        "ours, one": sum(share * s for share, s in zip(shares, levels, strict=True)),
    }
    kept = {}
    for ranks in RANKS:
        waited = {
            "themselves, one level a step": slowest_level(levels, shares, ranks),
            "themselves, a timestep for each image": slowest_mix(levels, shares, batch, ranks),
        }
        kept[str(ranks)] = {
            name: seconds[f"{precision} ddpm"] / mean / case["bounds"]["training"]
            for name, mean in {**ours, **waited}.items()
        }
    return {
        "resolution": case["resolution"],
        "precision": precision,
        "bound": case["bounds"]["training"],
        "share_of_bound_kept": kept,
    }


def slowest_level(seconds: list[float], shares: list[float], ranks: int) -> float:
    """Mean of the slowest of so many ranks, each of which draws one level."""
    mean, before = 0.0, 0.0
    reached = 0.0
    for time_taken, share in sorted(zip(seconds, shares, strict=True)):
        reached += share
        mean += time_taken * (reached**ranks - before**ranks)
        before = reached
    return mean


def slowest_mix(seconds: list[float], shares: list[float], batch: int, ranks: int) -> float:
    """Mean of the slowest of so many ranks, each of which draws a timestep for each image.

    An image is taken to cost its part of a whole batch at its level, which flatters small parts.
    """
    source = np.random.default_rng(0)
    counts = source.multinomial(batch, shares, size=(DRAWS, ranks))
    return float((counts @ np.array(seconds) / batch).max(axis=1).mean())


def measured(resolution: int, ranks: int, turns: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Median seconds of a step of each kind, and what of the FLOP bound is kept; and the spreads of that."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, resolution, turns, folder), nprocs=ranks)
        found: list[dict[str, float]] = json.loads((Path(folder) / "found.json").read_text())
    _, model = {**SIZES, **TOY}[resolution]
    run = make_run(TURNING_POINTS, resolution, model, TrainingParams(precision="fp32"))
    flops_bound = bound(level_flops(run), run.build_schedule().shares())

    def case(turns: list[dict[str, float]]) -> dict[str, Any]:
        seconds = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        kept = {name: seconds["ddpm"] / s / flops_bound for name, s in seconds.items() if name != "ddpm"}
        about = {"resolution": resolution, "batch_of_a_rank": BATCHES[resolution], "precision": "fp32", "ranks": ranks}
        return {**about, "seconds": seconds, "share_of_bound_kept": kept}

    return case(found), spreads([ratios(case([turn])) for turn in found])


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """What must not fall of what was measured, by name."""
    about = f"{case['resolution']} px, {case['precision']}, ranks: {case['ranks']}, share of the bound kept, "
    return {about + name: kept for name, kept in case["share_of_bound_kept"].items()}


def _rank(rank: int, ranks: int, resolution: int, turns: int, folder: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    batch, (_, model) = BATCHES[resolution], {**SIZES, **TOY}[resolution]
    pixels = np.random.default_rng(rank).integers(0, 256, (batch, 3, resolution, resolution), dtype=np.uint8)
    images, device = torch.from_numpy(pixels), torch.device("cpu")
    settings = TrainingParams(batch=batch * ranks, optimizer="adamw", precision="fp32")
    ddpm, dvdp = (
        start(make_run(points, resolution, model, settings), pixels, device) for points in ((), TURNING_POINTS)
    )
    schedule = dvdp.process.schedule
    # Ten steps hold each level as often as its share says.
    together = [level for level, share in enumerate(schedule.shares()) for _ in range(round(10 * share))]
    found = []
    # The first turn warms up.
    for turn in range(1 + turns):
        source = np.random.default_rng((turn, rank))
        alone = source.permutation(together).tolist()
        timesteps = source.permutation(np.repeat(together, batch)).reshape(len(together), batch)
        kinds = {
            "ours, all": [level_counts(schedule, "all", 0, 0, batch)] * 4,
            "ours, one": [_counts([level] * batch) for level in together],
            "themselves, one level a step": [_counts([level] * batch) for level in alone],
            "themselves, a timestep for each image": [_counts(levels) for levels in timesteps.tolist()],
        }
        seconds = {"ddpm": _seconds([partial(step, ddpm, images, [batch])] * 2)}
        for name, steps in kinds.items():
            seconds[name] = _seconds([partial(step, dvdp, images, counts) for counts in steps])
        if turn:
            found.append(seconds)
    if rank == 0:
        write_atomically(Path(folder) / "found.json", json.dumps(found))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _counts(levels: list[int]) -> list[int]:
    """Of images of each level."""
    return [levels.count(level) for level in range(len(TURNING_POINTS) + 1)]


def _seconds(steps: Sequence[Callable[[], None]]) -> float:
    """Mean of steps, one after the other."""
    began = time.perf_counter()
    for work in steps:
        work()
    return (time.perf_counter() - began) / len(steps)


if __name__ == "__main__":
    main()
