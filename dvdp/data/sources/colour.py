"""Pixels of any kind as sRGB, 8 bits, over white."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

#: Levels by which an sRGB profile may differ from another one.
_SAME = 3
#: Levels between white and black, below which a profile is a broken one.
_LEAST_CONTRAST = 128


class NoRangeError(Exception):
    """It cannot be told which values are black and white; the text says why."""


def to_rgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A loaded image of any mode as sRGB.

    Args:
        profile: ICC; empty if there is none. One that is broken, or is of other colours than the image, is ignored.

    Raises:
        NoRangeError: its numbers have no range that is known.
    """
    tags = getattr(image, "tag_v2", {})
    # Tags of TIFF that Pillow leaves to its reader: format (2 is signed), bits, photometric (0 where 0 is white).
    if tags.get(339, (1,))[0] == 2 and tags.get(258, (8,))[0] < 32:
        raise NoRangeError("signed pixels of 8 or 16 bits, whose range is not known, expected unsigned ones")
    if image.mode.startswith(("I", "F")):
        image = _in_8_bits(image, tags)
    if image.mode == "La":
        image = image.convert("LA")
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    rgb = image if image.mode == "CMYK" else image.convert("RGB")
    if profile:
        rgb = _converted(rgb.getchannel(0) if grey else rgb, profile)
    rgb = rgb.convert("RGB")
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    transform = _transform(profile, image.mode)
    return transform.apply(image) if transform else image


def _in_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of integers or floats, by the range of their type; by their values where that is known to mislead."""
    bits, inverted = tags.get(258, (16,))[0], tags.get(262) == 0
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        whole = bool((values == np.round(values)).all())
        # Zeros and ones alone may be either.
        if not (low >= 0 and (1 < high <= 255 if whole else high <= 1)):
            raise NoRangeError(f"floating-point pixels from {low:g} to {high:g}, expected 0 to 1, or whole ones to 255")
        grey = np.round(values if whole else values * 255).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise NoRangeError(f"32-bit pixels from {low} to {high}, expected 0 to 255 or 0 to 65535")
        # Where only TIFF says how many bits there are, and says 32, values decide.
        top = 255 if bits == 32 and high <= 255 else 2 ** min(bits, 16) - 1
        grey = np.round(np.arange(65536) / (top / 255)).clip(0, 255).astype(np.uint8)[values]
    eight_bits = Image.fromarray(255 - grey if inverted else grey)
    if "transparency" in image.info:
        eight_bits.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return eight_bits


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where pixels are to stay as they are."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        exact = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    steps = np.array([0, 8, 16, 32, 64, 96, 128, 160, 192, 224, 255], np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * len(Image.new(mode, (1, 1)).getbands()), indexing="ij"), axis=-1)
    colours = Image.frombytes(mode, (grid[..., 0].size, 1), grid.tobytes())
    shown = ImageCms.applyTransform(colours, exact)
    before, after = (np.asarray(image, np.int64)[0] for image in (colours.convert("RGB"), shown))
    broken = abs(after[0] - after[-1]).mean() < _LEAST_CONTRAST
    return None if broken or abs(before - after).max() <= _SAME else transform
