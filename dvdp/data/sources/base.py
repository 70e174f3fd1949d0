"""What a source is, and image files as pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dvdp.data.sources.colour import NoRangeError, to_rgb
from dvdp.data.sources.formats import HEAD_BYTES, format_of, formats, missing
from dvdp.data.sources.metadata import Metadata, without_metadata

Pixels = NDArray[np.uint8]

#: Left-out images and files that are named, for each reason; beyond, they are only counted.
MOST_NAMES = 100


class UnreadableImageError(Exception):
    """This one image cannot be read; the text says why."""


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    name: str
    """Its path within the source, or its number. Like a label as it is: :mod:`dvdp.data.prepare` makes it printable."""
    label: str | None
    read: Callable[[], Any]
    """Gives what the source holds, an image file or pixels, or raises UnreadableImageError. To be called before going
    on to the next item."""
    decode: Callable[[Any], Pixels] = np.asarray
    """Makes uint8 (h, w, 3) of that, or raises UnreadableImageError. A module's function: other processes call it."""

    def load(self) -> Pixels:
        """Both: uint8 (h, w, 3)."""
        return self.decode(self.read())


@dataclass
class LeftOut:
    """The files of a source that are not read, by the reason."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    """Of the first ones."""

    def add(self, name: str, reason: str) -> None:
        """Count a file."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= MOST_NAMES:
            self.names.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        return totals(self.counts)


def totals(counts: Mapping[str, int]) -> str:
    """In words, the most frequent first: ``12 other format, 3 hidden``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))


class Source(Protocol):
    """Images and what is known before reading them."""

    needs: str | None
    """What ``dataset.path`` must name, in words; None if it may be left out."""
    count: int
    labels: tuple[str, ...]
    """Names of the classes, sorted; empty if there are none."""
    left_out: LeftOut
    """Of a folder or an archive: its other files."""

    def __init__(self, path: Path | None) -> None: ...

    def __iter__(self) -> Iterator[Item]: ...


def decode(content: bytes) -> Pixels:
    """An image file as uint8 (h, w, 3) sRGB, turned as its EXIF or XMP says.

    Its colour profile is applied, grey is repeated, more than 8 bits are scaled to 8, transparent pixels are laid over
    white, and of an animation the first frame is taken. Broken metadata is ignored.

    Raises:
        UnreadableImageError: it cannot be decoded, or it is not known which of its numbers are black and white.
    """
    try:
        pixels, metadata = without_metadata(content)
        with Image.open(io.BytesIO(pixels), formats=formats()) as image:
            image.load()
            rgb = to_rgb(image, metadata.profile or image.info.get("icc_profile") or b"")
            # The boxes of an AVIF that turn it are told as EXIF by Pillow.
            metadata = Metadata(image.info.get("exif", b"")) if image.format == "AVIF" else metadata
            return np.asarray(metadata.upright(rgb))
    except NoRangeError as error:
        raise UnreadableImageError(str(error)) from None
    except UnidentifiedImageError:
        found = format_of(content[:HEAD_BYTES])
        if found and found not in formats():
            raise UnreadableImageError(missing(found)) from None
        kind = f" ({found}, damaged or of a kind that Pillow does not read)" if found else ""
        raise UnreadableImageError(f"no image in a known format{kind}") from None
    except Exception as error:  # Pillow's decoders raise whatever they trip over.
        raise UnreadableImageError(" ".join(f"{type(error).__name__}: {error}".split())) from None


def of_size(image: Pixels, *sizes: tuple[int, int]) -> Pixels:
    """The image, if it is of one of these sizes (width, height); else raises UnreadableImageError."""
    height, width = image.shape[:2]
    if (width, height) not in sizes:
        expected = " or ".join(f"{w}x{h}" for w, h in sizes)
        raise UnreadableImageError(f"{width}x{height} px, expected {expected}")
    return image
