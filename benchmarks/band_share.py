"""The share of a training step, and of a sampling call, that is spent outside the network: on bands, noise and loss.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.band_share --out benchmarks/results/band_share.json

The networks and batches of benchmarks/steps.py in fp32, for DDPM and each level of DVDP. What is outside is the same
step, and the same sampling, with a network that hands back its input, no optimiser and no average: pixels to floats,
timesteps, noise, x_t, target, loss and its gradient; in sampling all that is between two calls. The normal numbers are
timed by themselves, too: they are most of it and cannot be spared. Both take turns; medians of processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.steps import SIZES, TOY, TURNING_POINTS, draw, make_run, start, step
from benchmarks.timing import in_turns, seconds
from dvdp.config import TrainingParams
from dvdp.diffusion.randomness import ImageNoise
from dvdp.files import write_atomically
from dvdp.training.loop import Training

CPU = torch.device("cpu")


class NoNetwork(nn.Module):
    """In place of a network: its output is its input, and costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        # Clipping complains of a network without any.
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """A leaf, so that the loss has a gradient to compute."""
        return x.detach().requires_grad_()


def main() -> None:
    """Measure each resolution, print the shares and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=[*SIZES, *TOY], default=[32, 64])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for resolution in options.resolutions:
        cases.append(measure(resolution, options.turns))
        result = {"machine": machine(), "turning_points": TURNING_POINTS, "cases": cases}
        write_atomically(options.out, json.dumps(result, indent=2) + "\n")
        for kind in ("training", "sampling"):
            for name, found in cases[-1][kind].items():
                print(
                    f"{resolution} px, {kind}, {name}: {found['outside'] * 1e3:.2f} of {found['whole'] * 1e3:.1f} ms"
                    f" outside the network, {found['share']:.2%}; normal numbers {found['noise'] * 1e3:.2f} ms"
                )


def measure(resolution: int, turns: int) -> dict[str, Any]:
    """One size: seconds of a step, and of a sampling call, of each level."""
    batch, model = {**SIZES, **TOY}[resolution]
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, resolution, resolution), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    # Each work appends its seconds under (training or sampling, level, whole or outside or noise).
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    works: list[Callable[[], None]] = []
    for setting, points in (("DDPM", ()), ("DVDP", TURNING_POINTS)):
        run = make_run(points, resolution, model, TrainingParams(batch=batch, optimizer="adamw", precision="fp32"))
        whole, bare = (start(run, pixels, CPU) for _ in range(2))
        remove_network(bare)
        levels = range(len(points) + 1)
        for what, training, update in (("whole", whole, partial(step, whole)), ("outside", bare, bare.update)):
            for level in levels:
                alone = [batch if k == level else 0 for k in levels]
                steps = found["training", f"{setting}, level {level}", what]
                works.append(partial(timed, partial(update, images, alone), steps))
            calls = [found["sampling", f"{setting}, level {level}", what] for level in levels]
            works.append(partial(draw, training, batch // 2, calls))
        for level in levels:
            shape, source = (3, resolution >> level, resolution >> level), ImageNoise(0, 0, batch // 2)
            for kind, noise in (
                ("training", partial(torch.randn, (batch, *shape))),
                ("sampling", partial(source.normal, shape)),
            ):
                works.append(partial(timed, noise, found[kind, f"{setting}, level {level}", "noise"]))
    for _ in in_turns(works, turns, f"{resolution} px", warm_up=0):
        pass
    case: dict[str, Any] = {
        "resolution": resolution,
        "batch": batch,
        "sampling_batch": batch // 2,
        "training": {},
        "sampling": {},
    }
    for (kind, name, what), times in found.items():
        case[kind].setdefault(name, {})[what] = statistics.median(times)
    for entry in (*case["training"].values(), *case["sampling"].values()):
        entry["share"] = entry["outside"] / entry["whole"]
    return case


def remove_network(training: Training) -> None:
    """Leave of ``update`` and of sampling what is outside the network and the optimiser."""
    training.network = training.live = training.model.denoiser.network = NoNetwork()
    training.optimizers = []


def timed(work: Callable[[], object], into: list[float]) -> None:
    """Append the seconds of a piece of work."""
    into.append(seconds(work, CPU))


if __name__ == "__main__":
    main()
