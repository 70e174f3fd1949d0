"""What several ranks keep of the speed-up: our draws of levels beside ranks that draw for themselves.

    python -m benchmarks.ranks --steps benchmarks/results/steps.json --measure --out benchmarks/results/ranks.json

Computed for 1, 8 and 64 ranks from the seconds of each level that ``benchmarks.steps`` measured: ranks wait for each
other in every step, so the slowest level drawn by any of them rules. Exchanging gradients is left out; it costs all
alike. ``--measure`` runs two ranks of gloo on this machine, one thread each, for about a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.machine import machine
from benchmarks.steps import SIZES, TOY, TURNING_POINTS, bound, make_run, start, step
from dvdp.config import TrainingParams
from dvdp.files import write_atomically
from dvdp.training.budget import level_flops
from dvdp.training.levels import level_counts

RANKS = (1, 8, 64)
#: Steps that are drawn to compute what ranks wait for each other.
DRAWS = 4_000


def main() -> None:
    """Compute, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, required=True, help="result of benchmarks.steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--side", type=int, choices=[*SIZES, *TOY], default=32, help="of what is measured")
    options = parser.parse_args()
    cases = json.loads(options.steps.read_text())["cases"]
    result: dict[str, Any] = {
        "machine": machine(),
        "computed": [computed(case, p) for case in cases for p in case["sampling_seconds_per_call"]],
    }
    if options.measure:
        result["measured_side"] = options.side
        result["measured"] = {str(ranks): measured(options.side, ranks) for ranks in (1, 2)}
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
        "side": case["side"],
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


def measured(side: int, ranks: int) -> dict[str, float]:
    """Median seconds of a step of each kind, and what of the FLOP bound is kept."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, side, folder), nprocs=ranks)
        found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _rank(rank: int, ranks: int, side: int, folder: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    batch, model = {**SIZES, **TOY}[side]
    pixels = np.random.default_rng(rank).integers(0, 256, (batch, 3, side, side), dtype=np.uint8)
    images, device = torch.from_numpy(pixels), torch.device("cpu")
    settings = TrainingParams(batch=batch * ranks)
    ddpm, dvdp = (start(make_run(points, side, model, settings), pixels, device) for points in ((), TURNING_POINTS))
    schedule = dvdp.process.schedule
    flops_bound = bound(level_flops(dvdp.run), schedule.shares())
    # Ten steps hold each level as often as its share says.
    together = [level for level, share in enumerate(schedule.shares()) for _ in range(round(10 * share))]
    alone = random.Random(rank).sample(together, len(together))
    whole = [[batch if k == level else 0 for k in range(len(schedule.shares()))] for level in range(3)]
    spread = level_counts(schedule, "all", 0, 0, batch)
    kinds = {
        "ddpm": [partial(step, ddpm, images, [batch])] * 2,
        "ours, all": [partial(step, dvdp, images, spread)] * 4,
        "ours, one": [partial(step, dvdp, images, whole[level]) for level in together],
        "themselves, one level a step": [partial(step, dvdp, images, whole[level]) for level in alone],
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(3):
        for name, works in kinds.items():
            began = time.perf_counter()
            for work in works:
                work()
            if turn:
                seconds[name].append((time.perf_counter() - began) / len(works))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    kept = {f"{name}: share of the bound": medians["ddpm"] / s / flops_bound for name, s in medians.items()}
    if rank == 0:
        write_atomically(Path(folder) / "found.json", json.dumps({**medians, **kept}))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
