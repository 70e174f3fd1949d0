"""What happens at a turning point, as two pictures for the docs: states before and after a lift, and their spectra.

Prints the size of each band of the states too, finest first.

    python -m benchmarks.lift_pictures --out docs/pictures

The photograph comes with scikit-learn. Nothing is trained: the states are those of the forward process, and what a lift
makes of one of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dvdp import Process, Schedule
from dvdp.diffusion import bands
from dvdp.diffusion.randomness import generator
from dvdp.evaluation import figures
from dvdp.models.pixels import to_uint8

SIDE, TURNING_POINT = 160, 300


def main() -> None:
    """Draw both pictures."""
    from sklearn.datasets import load_sample_image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    out = parser.parse_args().out
    photo = load_sample_image("flower.jpg")[80 : 80 + SIDE, 340 : 340 + SIDE]
    x0 = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)[None].double() / 127.5 - 1
    process = Process(Schedule.dvdp([TURNING_POINT]))
    noise = torch.randn(x0.shape, generator=generator("lift pictures"), dtype=torch.float64)
    fresh = torch.randn(x0.shape, generator=generator("lift pictures", "lift"), dtype=torch.float64)

    true = process.diffuse(x0, TURNING_POINT, noise)
    low = bands.down(true)
    lifted = process.lift(low, 1, fresh)
    bilinear = torch.nn.functional.interpolate(low / 2, scale_factor=2, mode="bilinear")
    states = {
        f"t = {TURNING_POINT}, level 0\nbefore the drop": true,
        f"t = {TURNING_POINT}, level 1\n{SIDE // 2} px": low / 2,
        "nearest neighbour:\nno noise in the new band": bands.up(low),
        "lifted: nearest neighbour\nand noise in the new band": lifted,
        "bilinear:\nthe noise is blurred": bilinear,
    }
    figures.save_png(row(states), out / "lift.png")
    for name, state in states.items():
        if state.shape == true.shape:
            sizes = bands.energies(state, 3).sqrt()[0].tolist()
            print(f"{' '.join(name.split()):60} " + " ".join(f"{size:.3f}" for size in sizes))

    figures.curves(
        out / "lift_spectra.png",
        {
            "diffused at level 0 (true)": spectrum(true),
            "lifted": spectrum(lifted),
            "nearest neighbour alone": spectrum(bands.up(low)),
            "bilinear alone": spectrum(bilinear),
            "clean image": spectrum(x0),
        },
        title=f"Power over frequency at t = {TURNING_POINT}",
        xlabel="cycles per image",
        ylabel="mean power",
        logy=True,
    )


def row(states: dict[str, Tensor]) -> Image.Image:
    """The states beside each other at their true size, on the scale of the pixels of level 0."""
    gap, label = 12, 40
    font = ImageFont.load_default(14)
    tiles = [to_uint8((x / 1.6).clamp(-1, 1).float())[0].permute(1, 2, 0).numpy() for x in states.values()]
    width = sum(max(tile.shape[1], 170) for tile in tiles) + gap * (len(tiles) + 1)
    sheet = Image.new("RGB", (width, SIDE + label + 3 * gap), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for name, tile in zip(states, tiles, strict=True):
        column = max(tile.shape[1], 170)
        sheet.paste(Image.fromarray(tile), (left + (column - tile.shape[1]) // 2, gap + (SIDE - tile.shape[0]) // 2))
        draw.multiline_text((left + column // 2, SIDE + 2 * gap), name, "#1d2330", font, anchor="ma", align="center")
        left += column + gap
    return sheet


def spectrum(x: Tensor) -> list[tuple[float, float]]:
    """(cycles per image, mean power) over rings of the two-dimensional spectrum; white noise of size 1 has power 1."""
    resolution = x.shape[-1]
    power = torch.fft.fft2(x - x.mean(dim=(-2, -1), keepdim=True), norm="ortho").abs().square().mean(dim=(0, 1))
    frequency = torch.fft.fftfreq(resolution, 1 / resolution, dtype=torch.float64)
    radius = torch.hypot(frequency[:, None], frequency[None, :])
    edges = torch.logspace(0, np.log10(resolution / 2 * 2**0.5), 40, dtype=torch.float64)
    ring = torch.bucketize(radius, edges)
    return [
        (radius[ring == i].mean().item(), power[ring == i].mean().item()) for i in range(1, 40) if (ring == i).any()
    ]


if __name__ == "__main__":
    main()
