"""An image that is given with a request: what of it is known of the images that a model draws for it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dvdp.diffusion.conditional import (
    LUMINANCE,
    known_bands,
    known_luminance,
    known_pixels,
    state_of_bands,
    timestep_of,
)
from dvdp.diffusion.process import Process
from dvdp.errors import UserError
from dvdp.models.pixels import to_float

#: Pixels of a picture that is given, at most.
MOST_PIXELS = 2**24
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
#: Times that a step is made where a hole is filled, unless the request says.
RESAMPLING = 5


@dataclass(frozen=True, eq=False)
class Given:
    """What is known of images; one of :attr:`known`, ``upscale``, ``strength`` and ``colourise`` is there at least."""

    image: Tensor
    """(1, 3, s, s) in [-1, 1]; s is the model's resolution over ``upscale``."""
    known: Tensor | None = None
    """(1, 1, s, s), true where a pixel is to stay."""
    upscale: int = 1
    """A power of 2."""
    strength: float | None = None
    """Share of the timesteps that the image is diffused by, above 0 and at most 1."""
    colourise: bool = False
    """Only the brightness of the pixels is known."""
    resampling: int = 1

    def options(self, process: Process, count: int, seed: int, first: int, device: torch.device) -> dict[str, Any]:
        """Arguments of :func:`dvdp.diffusion.sampling.sample` for images number ``first`` on."""
        image = self.image.to(device)
        options: dict[str, Any] = {"resampling": self.resampling}
        if self.strength is not None:
            t = timestep_of(self.strength, process.schedule.timesteps)
            options["image"] = image.expand(count, -1, -1, -1), t
        if self.known is not None:
            options["constraint"] = known_pixels(image, self.known.to(device))
        elif self.upscale > 1:
            level = self.upscale.bit_length() - 1
            coarse = self.upscale * image
            options["constraint"] = known_bands(coarse, level)
            options["start"] = state_of_bands(process, coarse, level, count, seed, first)
        elif self.colourise:
            weights = torch.tensor(LUMINANCE, device=device)[:, None, None]
            options["constraint"] = known_luminance((weights * image).sum(dim=1, keepdim=True))
        return options


def given(
    resolution: int,
    image: Path | bytes | None = None,
    mask: Path | bytes | None = None,
    upscale: int | None = None,
    strength: float | None = None,
    colourise: bool = False,
    resampling: int | None = None,
) -> Given | None:
    """What a request gives; None if it gives nothing.

    Args:
        resolution: of the model's images.
        image: a picture of ``resolution / upscale`` px or a whole multiple of that, which is averaged.
        mask: as large as the image, white where it is to be drawn anew.
        resampling: see :func:`dvdp.diffusion.sampling.sample`; by default :data:`RESAMPLING` with a mask.

    Raises:
        UserError: something is out of range, is no picture, has another size or number of channels, or does not go
            with the rest.
    """
    if not isinstance(colourise, bool):
        raise UserError(f"colourise: found {colourise!r}, expected true or false.")
    ways = {"mask": mask, "upscale": upscale, "strength": strength, "colourise": colourise or None}
    chosen = [name for name, value in ways.items() if value is not None]
    if image is None:
        extra = [*chosen, *(["resampling"] if resampling is not None else [])]
        if extra:
            raise UserError(f"image: found none beside {extra[0]}, expected the picture that it is for; give one.")
        return None
    if not chosen:
        raise UserError("image: found it alone, expected mask, upscale, strength or colourise beside it; give one.")
    if len(chosen) > 1 and set(chosen) != {"mask", "strength"}:
        raise UserError(
            f"{chosen[1]}: found it beside {chosen[0]}, expected one of them (strength goes with mask); leave one out."
        )
    if resampling is not None and not (_is_whole(resampling) and 1 <= resampling <= 100):
        raise UserError(f"resampling: found {resampling!r}, expected a whole number of 1 to 100.")
    if strength is not None:
        if not isinstance(strength, int | float):
            raise UserError(f"strength: found {strength!r}, expected a number above 0 and at most 1.")
        timestep_of(strength, 1)
    powers = [2**k for k in range(1, 13) if resolution % 2**k == 0]
    if upscale is not None and upscale not in powers:
        raise UserError(f"upscale: found {upscale!r}, expected a power of 2, at least 2, that divides {resolution} px.")
    picture = _read(image, "image")
    channels = len(picture.getbands())
    if picture.mode != "RGB" and not (colourise and picture.mode == "L"):
        raise UserError(
            f"image: found {channels} {'channel' if channels == 1 else 'channels'} ({picture.mode}), expected 3 (RGB);"
            " convert it."
        )
    factor = int(upscale or 1)
    side, (width, height) = resolution // factor, picture.size
    if width != height or width % side:
        raise UserError(
            f"image: found {width} x {height} px, expected {side} x {side} or a multiple of it; crop or resize it."
        )
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
    known = None
    if mask is not None:
        hole = _read(mask, "mask")
        if hole.size != picture.size:
            raise UserError(
                f"mask: found {hole.size[0]} x {hole.size[1]} px, expected the size of the image, {width} x {height};"
                " resize it."
            )
        unknown = torch.from_numpy(np.array(hole.convert("L"))).float()[None, None] > 127
        # A pixel of the model is known where all that it is the mean of are.
        known = F.max_pool2d(unknown.float(), width // side) == 0
    return Given(
        F.avg_pool2d(to_float(pixels), width // side),
        known,
        factor,
        strength,
        colourise,
        int(resampling or (RESAMPLING if mask is not None else 1)),
    )


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | float) and number == int(number)


def _read(source: Path | bytes, name: str) -> Image.Image:
    where = f" '{source}'" if isinstance(source, Path) else ""
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        if picture.width * picture.height <= MOST_PIXELS:
            picture.load()
            return picture
        found = f"{picture.width} x {picture.height} px"
    except FileNotFoundError:
        raise UserError(f"{name}: found no file{where}, expected a picture; give its path.") from None
    # Pillow raises these for what is damaged.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        found = f"what is no picture{where}"
    raise UserError(f"{name}: found {found}, expected {', '.join(FORMATS)} of at most {MOST_PIXELS:,} pixels.")
