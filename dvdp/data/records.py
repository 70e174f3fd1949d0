"""Images as records of the store: encoded, each with its digest.

A record's value is the label (little-endian int32, -1 for none), then the pixels: raw uint8 (3, side, side), or a PNG
or JPEG file. Its digest is SHA-256 over the pixels that readers get (uint8, 3 x resolution x resolution) and the label.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from dvdp.data.moments import Moments

Encoding = Literal["raw", "png", "jpeg"]
Resize = Literal["area", "lanczos", "bicubic"]
Image = NDArray[np.uint8]

DIGEST_BYTES = 32


@dataclass(frozen=True)
class Form:
    """How images are resized and kept."""

    resolution: int
    """Side, in pixels."""
    encoding: Encoding = "raw"
    jpeg_quality: int | None = None
    """Of JPEG, from 1 to 100; None for the others."""
    resize: Resize = "area"
    """See :func:`dvdp.data.transforms.prepare_transform`."""


@dataclass(frozen=True)
class Records:
    """Some images, ready for the store, each in the same place of every list."""

    values: list[bytes]
    labels: list[int]
    digests: list[bytes]
    contents: list[bytes]
    """SHA-256 of the pixels alone: equal images are known by it."""
    moments: Moments
    """Of all of them, as readers get them."""


def encode(images: Sequence[Image], labels: Sequence[int], form: Form) -> Records:
    """Images (3, side, side), each with its label, as records.

    Raises:
        ValueError: an image has another shape or type.
    """
    values, digests, contents, seen = [], [], [], []
    for image, label in zip(images, labels, strict=True):
        if image.shape != (3, form.resolution, form.resolution) or image.dtype != np.uint8:
            raise ValueError(f"image: {image.dtype} {image.shape}")
        values.append(label.to_bytes(4, "little", signed=True) + _encode(image, form))
        pixels = decode(values[-1], form)[0] if form.encoding == "jpeg" else image
        content, digest = digests_of(pixels, label)
        contents.append(content)
        digests.append(digest)
        seen.append(pixels)
    return Records(values, list(labels), digests, contents, Moments.of(seen, form.resolution))


def decode(value: Any, form: Form) -> tuple[Image, int]:
    """Image (3, side, side) and label of a record's value: bytes, or a buffer that may go away later."""
    label, resolution = int.from_bytes(value[:4], "little", signed=True), form.resolution
    if form.encoding == "raw":
        return np.frombuffer(value[4:], dtype=np.uint8).reshape(3, resolution, resolution).copy(), label
    with PillowImage.open(io.BytesIO(value[4:])) as image:
        return np.stack([np.asarray(plane) for plane in image.split()]), label


def digests_of(pixels: Image, label: int) -> tuple[bytes, bytes]:
    """SHA-256 of the pixels, and of the pixels and the label."""
    digest = hashlib.sha256(pixels.tobytes())
    content = digest.digest()
    digest.update(label.to_bytes(4, "little", signed=True))
    return content, digest.digest()


def _encode(image: Image, form: Form) -> bytes:
    if form.encoding == "raw":
        return image.tobytes()
    picture, buffer = PillowImage.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), io.BytesIO()
    if form.encoding == "png":
        picture.save(buffer, "PNG")
    else:
        # Colour at full resolution: halved, it would be part of what a model learns.
        picture.save(buffer, "JPEG", quality=form.jpeg_quality, subsampling=0)
    return buffer.getvalue()
