"""Which image formats are read, and how a file's first bytes show its format."""

from __future__ import annotations

import contextlib
import re
from functools import lru_cache
from importlib import import_module

from PIL import Image

#: The only decoders that ``Image.open`` may try, by Pillow's names. Left out are those that start other programs (EPS),
#: that open what they find with any decoder (IPTC), or that have no pixels of their own (WMF, MPEG, HDF5, ..). TGA is
#: last: it has no magic number, and is tried on whatever no other decoder takes.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "JXL", "ICO", "DDS", "QOI", "PSD",
    "ICNS", "PCX", "SGI", "SUN", "XPM", "TGA",
)  # fmt: skip

#: Of the formats that Pillow reads through another package: its module, its name, and our extra that installs it.
PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif", "heic"), "JXL": ("pillow_jxl", "pillow-jxl-plugin", "jxl")}

#: Files with these suffixes are images without a look at their content; all others only if their content says so.
IMAGE_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip

#: Raw files of cameras are TIFFs, but what Pillow finds in them is a preview.
_RAW_SUFFIXES = (
    ".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".kdc", ".mef", ".nef", ".nrw", ".pef", ".rwl", ".sr2", ".srf",
    ".srw",
)  # fmt: skip

#: As many first bytes of a file as :func:`format_of` needs.
HEAD_BYTES = 64

_HEADS = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
    "PPM": rb"P[1-6fF]\s+(#|-?\d)",
    "AVIF": rb"....ftyp(avi[fs]|m[is]f1.{4}(.{4})*avif)",
    "JPEG2000": rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  \r\n\x87\n",
    "HEIF": rb"....ftyp(hei[cxms]|hev[cxms]|m[is]f1)",
    "JXL": rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n",
    "ICO": rb"\x00\x00\x01\x00[^\x00]\x00...\x00[\x00\x01]\x00",
    "DDS": rb"DDS ",
    "QOI": rb"qoif",
    "PSD": rb"8BPS",
    "ICNS": rb"icns",
    "PCX": rb"\x0a[\x00\x02-\x05]\x01[\x01\x02\x04\x08]",
    "SGI": rb"\x01\xda[\x00\x01][\x01\x02]",
    "SUN": rb"\x59\xa6\x6a\x95",
    "XPM": rb"/\* XPM \*/",
}


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that are installed, for ``Image.open(.., formats=formats())``."""
    Image.init()
    for module, _, _ in PLUGINS.values():
        with contextlib.suppress(ImportError):
            import_module(module)
    with contextlib.suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def format_of(head: bytes) -> str | None:
    """The format of an image file that begins like this, installed or not; None for anything else."""
    return next((name for name, pattern in _HEADS.items() if re.match(pattern, head[:HEAD_BYTES], re.DOTALL)), None)


def reason_against(suffix: str, head: bytes) -> str:
    """Why a file of this suffix (lower case) and beginning is not read as an image; "" if it is."""
    found = format_of(head)
    if found is None or suffix in _RAW_SUFFIXES:
        return "other format"
    return "" if found in formats() else missing(found)


def missing(name: str) -> str:
    """Why a file of a format that is not installed cannot be read, and what to install."""
    if name not in PLUGINS:
        return f"{name}, which this build of Pillow does not read"
    _, package, extra = PLUGINS[name]
    return f"{name}, which needs the extra {extra} (`pip install {package}`)"
