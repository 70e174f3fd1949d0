"""How fast the errors of the deterministic rules fall with the steps, where the exact answer is known.

    python -m benchmarks.convergence --out docs/pictures/convergence.png

Data are independent normal numbers in every band (CIFAR-10's deviations), turning points at 0.3 T and 0.6 T of
T = 10,000 timesteps. For such data the denoiser and the probability flow are known. The error is that of the states at
both turning points and at T / 10, relative, from the same noise as the exact flow: the largest of the three.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dvdp import Process, Schedule, bands, sample
from dvdp.evaluation import figures
from dvdp.randomness import ImageNoise
from dvdp.sampling import Progress

DEVIATIONS = torch.tensor([0.144, 0.374, 0.879], dtype=torch.float64)
RULES = ("ddim", "dpm++2m", "deis2", "deis3")
STEPS = (10, 20, 50, 100, 200, 400, 800)
PROCESS = Process(Schedule.dvdp([3000, 6000], timesteps=10_000))
#: Where the states are looked at, on the way down.
CHECKED = (6000, 3000, 1000)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .png")
    out = parser.parse_args().out
    lines = {rule: [(float(steps), error(rule, steps)) for steps in STEPS] for rule in RULES}
    for rule, line in lines.items():
        print(rule, *(f"{steps:.0f}: {value:.2e}" for steps, value in line))
    first, second = lines["ddim"][0][1], lines["deis2"][3][1]
    lines["order 1"] = [(float(n), 2 * first * STEPS[0] / n) for n in STEPS]
    lines["order 2"] = [(float(n), 3 * second * (STEPS[3] / n) ** 2) for n in STEPS]
    figures.curves(
        out, lines, title="Error of deterministic rules", xlabel="steps in all", ylabel="error", logy=True, logx=True
    )


def error(rule: str, steps: int) -> float:
    """Of the states at :data:`CHECKED`."""
    found: dict[int, Tensor] = {}

    def keep(progress: Progress) -> None:
        if progress.s in CHECKED:
            found[progress.s] = progress.state

    sample(PROCESS, denoise, (1, 1, 8, 8), steps, rule, clip=False, dtype=torch.float64, callback=keep)
    source = ImageNoise(0, 0, 1)
    x = PROCESS.schedule.noise[2, -1] * source.normal((1, 2, 2), torch.float64)
    errors = []
    for t, s in pairwise((10_000, *CHECKED)):
        level = PROCESS.level(s + 1)
        if t < 10_000:
            x = PROCESS.lift(x, level + 1, source.normal((1, 8 >> level, 8 >> level), torch.float64))
        x = bands.scale(x, deviations(s, level) / deviations(t, level))
        errors.append(((found[s] - x).norm() / x.norm()).item())
    return max(errors)


def denoise(x: Tensor, t: Tensor) -> Tensor:
    """The expected noise in a state."""
    level = (8 // x.shape[-1]).bit_length() - 1
    factors = PROCESS.schedule.noise[level:, int(t[0])] / deviations(int(t[0]), level).square()
    return bands.scale(x, factors)


def deviations(t: int, level: int) -> Tensor:
    """Of the state's bands at t."""
    return torch.hypot(PROCESS.schedule.signal[level:, t] * DEVIATIONS[level:], PROCESS.schedule.noise[level:, t])


if __name__ == "__main__":
    main()
