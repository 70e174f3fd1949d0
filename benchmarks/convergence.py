"""How fast the errors of the solvers fall with the steps, where the exact answer is known.

    python -m benchmarks.convergence --out docs/pictures/convergence.png

Data are independent normal numbers in every band (CIFAR-10's std), turning points at 0.3 T and 0.6 T of
T = 10,000 timesteps. For such data the denoiser, the probability flow and the deviation of every band are known. The
error is that of the states at both turning points and at T / 10, relative, the largest of the three: for deterministic
solvers of the state itself, from the same noise as the exact flow; for all solvers of the std of its bands over all
images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dvdp import Process, Schedule, sample
from dvdp.diffusion import bands
from dvdp.diffusion.randomness import ImageNoise
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.solvers import make_solver
from dvdp.diffusion.timesteps import step_grid
from dvdp.evaluation import figures
from dvdp.planning.planner import passage

DEVIATIONS = torch.tensor([0.144, 0.374, 0.879], dtype=torch.float64)
DETERMINISTIC = ("ddim", "dpm++2m", "deis2", "deis3")
ALL = (*DETERMINISTIC, "ddpm", "sde-dpm++2m")
STEPS = (10, 20, 50, 100, 200, 400, 800)
PROCESS = Process(Schedule.dvdp([3000, 6000], timesteps=10_000))
#: Where the states are looked at, on the way down.
CHECKED = (6000, 3000, 1000)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .png")
    out = parser.parse_args().out
    found = {
        "one image from the same noise": {
            solver: [error(solver, steps) for steps in STEPS] for solver in DETERMINISTIC
        },
        "the deviation of bands, of all images": {
            solver: [law_error(solver, steps) for steps in STEPS] for solver in ALL
        },
    }
    for title, lines in found.items():
        for solver, line in lines.items():
            print(f"{title}: {solver}", *(f"{steps}: {value:.2e}" for steps, value in zip(STEPS, line, strict=True)))
    draw(found, out)


def draw(found: Mapping[str, Mapping[str, Sequence[float]]], out: Path) -> None:
    """A panel for each error, with the slopes of both orders."""
    from matplotlib.figure import Figure

    colours = dict(zip(ALL, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00"), strict=True))
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, lines) in zip(panels, found.items(), strict=True):
        for solver, line in lines.items():
            axes.loglog(STEPS, line, "o-", color=colours[solver], label=solver, linewidth=1.6, markersize=4)
        for order, start in ((1, 0.3), (2, 0.4)):
            slope = [start * (STEPS[0] / steps) ** order for steps in STEPS]
            axes.loglog(STEPS, slope, "--", color="#999999", linewidth=1)
            axes.annotate(f"order {order}", (STEPS[-1], slope[-1]), (4, 0), textcoords="offset points", fontsize=8)
        axes.set(title=title, xlabel="steps in all")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=9, loc="lower left")
    panels[0].set_ylabel("error")
    figures.save_figure(figure, out)


def error(solver: str, steps: int) -> float:
    """Of the states at :data:`CHECKED`."""
    found: dict[int, Tensor] = {}

    def keep(progress: Progress) -> None:
        if progress.s in CHECKED:
            found[progress.s] = progress.state

    sample(PROCESS, denoise, (1, 1, 8, 8), steps, solver, clip=False, dtype=torch.float64, callback=keep)
    source = ImageNoise(0, 0, 1)
    x = PROCESS.schedule.noise[2, -1] * source.normal((1, 2, 2), torch.float64)
    errors = []
    for t, s in pairwise((10_000, *CHECKED)):
        level = PROCESS.level(s + 1)
        if t < 10_000:
            x = PROCESS.lift(x, level + 1, source.normal((1, 8 >> level, 8 >> level), torch.float64))
        x = bands.scale(x, std(s, level) / std(t, level))
        errors.append(((found[s] - x).norm() / x.norm()).item())
    return max(errors)


def law_error(solver: str, steps: int) -> float:
    """Of the std of bands at :data:`CHECKED`, from the exact ones at the top of each level."""
    errors = []
    for level, grid in step_grid(PROCESS.schedule, steps):
        times = [t for t in grid if t >= CHECKED[-1]]
        factors, terms = passage(PROCESS, make_solver(solver), times, DEVIATIONS[level:].tolist())
        # A band has the row of its own turning point.
        found = factors.diagonal() * std(times[0], level).square() + terms.diagonal()
        errors.append((found.sqrt() / std(times[-1], level) - 1).abs().max().item())
    return max(errors)


def denoise(x: Tensor, t: Tensor) -> Tensor:
    """The expected noise in a state."""
    level = (8 // x.shape[-1]).bit_length() - 1
    factors = PROCESS.schedule.noise[level:, int(t[0])] / std(int(t[0]), level).square()
    return bands.scale(x, factors)


def std(t: int, level: int) -> Tensor:
    """Of the state's bands at t."""
    return torch.hypot(PROCESS.schedule.signal[level:, t] * DEVIATIONS[level:], PROCESS.schedule.noise[level:, t])


if __name__ == "__main__":
    main()
