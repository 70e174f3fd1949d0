"""Resize, crop and flip. The only module that knows albumentations: its import costs seconds, so import this late."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

# Read when albumentations is imported: without it, it asks the network for a newer version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

# It would import torch, which takes two seconds, for a transform that nobody here uses.
sys.modules.setdefault("albumentations.pytorch", ModuleType("albumentations.pytorch"))

import albumentations as A  # noqa: E402
import cv2  # noqa: E402
from PIL import Image as PillowImage  # noqa: E402

from dvdp.data.records import Resize  # noqa: E402

# OpenCV's own threads can hang in a forked loader worker, and fight for the cores with those of other workers.
cv2.setNumThreads(0)

Image = NDArray[np.uint8]


def prepare_transform(resolution: int, resize: Resize = "area") -> Callable[[Image], Image]:
    """The way from any image to a training image: a centred square of its shorter resolution, resized.

    Resizing comes after cropping, so that a very long image never has to be enlarged whole.

    Args:
        resize: ``area`` averages pixels over their area when shrinking and interpolates (bicubic) when enlarging;
            ``lanczos`` and ``bicubic`` are Pillow's filters, which widen when shrinking, to the bit.

    Returns:
        A function from uint8 (h, w, 3) to uint8 (3, side, side).
    """
    if resize == "area":
        resized = A.Resize(resolution, resolution, interpolation=cv2.INTER_CUBIC, area_for_downscale="image")
    else:
        resized = A.Lambda(image=partial(_by_pillow, resolution, PillowImage.Resampling[resize.upper()]))

    # Making a pipeline takes ten times as long as running it, and images come in few sizes.
    @lru_cache(maxsize=256)
    def pipeline(resolution: int) -> A.Compose:
        return A.Compose([A.CenterCrop(resolution, resolution), resized])

    def transform(image: Image) -> Image:
        square = pipeline(min(image.shape[:2]))(image=image)["image"]
        return np.ascontiguousarray(square.transpose(2, 0, 1))

    return transform


def _by_pillow(resolution: int, resampling: PillowImage.Resampling, image: Image, **_: object) -> Image:
    return np.asarray(PillowImage.fromarray(image).resize((resolution, resolution), resampling))


def train_transform() -> Callable[[Image, int], Image]:
    """Mirror an image left to right, half of the time.

    Returns:
        A function of a uint8 image (3, h, w) and a seed; the draw is a function of the seed alone. (The transform's
        own random state would start again in each loader worker and repeat its draws every epoch.)
    """
    flip = A.HorizontalFlip(p=0.5)

    def transform(image: Image, seed: int) -> Image:
        flip.set_random_seed(seed)
        # The planes as one tall picture: interleaving the colours and back takes fifteen times as long.
        mirrored: Image = flip(image=image.reshape(-1, image.shape[2]))["image"]
        return mirrored.reshape(image.shape)

    return transform
