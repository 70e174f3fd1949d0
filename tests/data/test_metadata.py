"""A flaw in metadata costs no image, and the orientation survives it; broken pixels stay unreadable."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from dvdp.data.sources import UnreadableImageError, decode
from tests.data.support import (
    P3_PRIMARIES,
    chunk,
    encoded,
    jpeg_with,
    png_with,
    rgb_profile,
    segment,
)

RANDOM = np.random.default_rng(0)
PICTURE = Image.fromarray(RANDOM.integers(0, 256, (6, 10, 3), dtype=np.uint8))
KINDS = {"PNG": {}, "JPEG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TURNED = (10, 6, 3)


def exif(*entries: tuple[int, int, int, bytes], order: str = "<", after: bytes = b"") -> bytes:
    """(tag, type, count, value or offset) each, in that order; the next directory is at ``after``, or nowhere."""
    directory = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    start = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return start + struct.pack(f"{order}H", len(entries)) + directory + (after or bytes(4))


def pixels(kind: str) -> np.ndarray:
    return decode(encoded(PICTURE, kind, **KINDS[kind]))


def turned(kind: str) -> np.ndarray:
    return np.rot90(pixels(kind), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_exif_and_xmp_turn_every_kind_of_file(kind: str) -> None:
    orientation = exif((0x0112, 3, 1, b"\6\0"))
    content = encoded(PICTURE, kind, exif=b"Exif\0\0" + orientation, **KINDS[kind])
    np.testing.assert_array_equal(decode(content), turned(kind))
    if kind in ("JPEG", "WEBP"):
        np.testing.assert_array_equal(decode(encoded(PICTURE, kind, xmp=XMP, **KINDS[kind])), turned(kind))
    if kind == "TIFF":
        np.testing.assert_array_equal(decode(encoded(PICTURE, kind, tiffinfo={700: XMP})), turned(kind))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_those_of_pillow(orientation: int) -> None:
    told = Image.Exif()
    told[0x0112] = orientation
    for kind in ("PNG", "JPEG"):
        content = encoded(PICTURE, kind, exif=told)
        with Image.open(io.BytesIO(content)) as image:
            np.testing.assert_array_equal(decode(content), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize(
    ("kind", "count", "value", "is_turned"),
    [
        (3, 1, b"\6\0", True),
        (1, 1, b"\6", True),
        (4, 1, b"\6\0\0\0", True),
        (7, 1, b"\6", True),
        (8, 1, b"\6\0", True),
        (3, 2, b"\6\0\6\0", True),
        (2, 2, b"6\0", True),
        (2, 4, b"top\0", False),
        (2, 1, b"\0", False),
        (3, 0, b"\6\0", False),
        (3, 1, b"\0\0", False),
        (3, 1, b"\x09\0", False),
        (3, 1, b"\xff\xff", False),
        (8, 1, b"\xff\xff", False),
        (11, 1, struct.pack("<f", 6), True),
        (11, 1, struct.pack("<f", float("nan")), False),
        (5, 1, struct.pack("<I", 26), True),
        (5, 1, struct.pack("<I", 10**9), False),
        (99, 1, b"\6\0", False),
        (0, 1, b"\6\0", False),
    ],
)
@pytest.mark.parametrize("file", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_orientation_of_any_type_is_used_or_ignored(
    file: str, kind: int, count: int, value: bytes, is_turned: bool
) -> None:
    if file == "TIFF":
        content = with_tag(encoded(PICTURE, "TIFF"), (0x0112, kind, count, value))
        content = content.replace(struct.pack("<I", 26), struct.pack("<I", len(content)), 1) if kind == 5 else content
    else:
        content = encoded(
            PICTURE, file, exif=b"Exif\0\0" + exif((0x0112, kind, count, value)) + RATIONAL, **KINDS[file]
        )
    np.testing.assert_array_equal(
        decode(content + RATIONAL * (file == "TIFF")), (turned if is_turned else pixels)(file)
    )


RATIONAL = struct.pack("<II", 12, 2)


def with_tag(content: bytes, *entries: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF with more tags: its directory is written again at its end."""
    (place,) = struct.unpack_from("<I", content, 4)
    (number,) = struct.unpack_from("<H", content, place)
    old = [content[place + 2 + 12 * i :][:12] for i in range(number)]
    new = [struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries]
    directory = struct.pack("<H", len(old + new)) + b"".join(
        sorted(old + new, key=lambda e: struct.unpack("<H", e[:2]))
    )
    return content[:4] + struct.pack("<I", len(content)) + content[8:] + directory + bytes(4)


ORIENTATION = chunk(b"eXIf", exif((0x0112, 3, 1, b"\6\0")))
RAW_PROFILE = b"Raw profile type exif\0\nexif\n      26\n" + exif((0x0112, 3, 1, b"\6\0")).hex().encode() + b"\n"
PNG_FLAWS = {
    "large text": chunk(b"tEXt", b"parameters\0" + b"x" * (3 << 20)),
    "large compressed text": chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(80 << 20), 1)),
    "large international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
    "much text": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 70,
    "text without a key": chunk(b"tEXt", b""),
    "text of another compression": chunk(b"zTXt", b"a\0\7abc"),
    "broken compressed text": chunk(b"zTXt", b"a\0\0abc"),
    "text that is too short": chunk(b"iTXt", b"a\0"),
    "text that is not UTF-8": chunk(b"iTXt", b"a\0\0\0\xff\0\xff\0\xff\xff"),
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"\0",
    "large profile": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(40 << 20), 1)),
    "profile of another compression": chunk(b"iCCP", b"a\0\7abc"),
    "broken profile": chunk(b"iCCP", b"a\0\0abc"),
    "profile that is cut short": chunk(b"iCCP", b"a\0\0" + zlib.compress(rgb_profile(P3_PRIMARIES))[:-20]),
    "empty profile": chunk(b"iCCP", b""),
    "short sizes": chunk(b"pHYs", b"\0"),
    "short gamma": chunk(b"gAMA", b"\0"),
    "short primaries": chunk(b"cHRM", b"\0\0\0"),
    "short intent": chunk(b"sRGB", b""),
    "short transparent colour": chunk(b"tRNS", b"\0\0\0"),
    "short animation": chunk(b"acTL", b"\0"),
    "private": chunk(b"prVt", b"\0" * 100),
    "broken XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<\xff\0<x tiff:Orientation="),
}


@pytest.mark.parametrize("flaw", PNG_FLAWS)
def test_a_flaw_of_a_png_costs_neither_pixels_nor_orientation(flaw: str) -> None:
    plain = encoded(PICTURE)
    for content in (png_with(plain, PNG_FLAWS[flaw], ORIENTATION), png_with(plain, ORIENTATION, PNG_FLAWS[flaw])):
        np.testing.assert_array_equal(decode(content), turned("PNG"))
    end = plain.index(b"IEND") - 4
    np.testing.assert_array_equal(decode(plain[:end] + PNG_FLAWS[flaw] + plain[end:]), pixels("PNG"))
    # The end of the file is missing, in the middle of metadata.
    np.testing.assert_array_equal(decode(plain[:end] + PNG_FLAWS[flaw][:9]), pixels("PNG"))


def test_a_profile_of_many_megabytes_is_still_used() -> None:
    profile = rgb_profile(P3_PRIMARIES)
    long = (len(profile) + (4 << 20)).to_bytes(4, "big") + profile[4:] + RANDOM.bytes(4 << 20)
    plain = encoded(PICTURE, icc_profile=profile)
    content = png_with(encoded(PICTURE), chunk(b"iCCP", b"a\0\0" + zlib.compress(long, 1)))
    np.testing.assert_array_equal(decode(content), decode(plain))
    assert not np.array_equal(decode(content), pixels("PNG"))


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt"])
def test_orientation_in_the_text_of_imagemagick_is_used(kind: bytes) -> None:
    key, _, text = RAW_PROFILE.partition(b"\0")
    data = key + b"\0" + (text if kind == b"tEXt" else b"\0" + zlib.compress(text))
    np.testing.assert_array_equal(decode(png_with(encoded(PICTURE), chunk(kind, data))), turned("PNG"))
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    np.testing.assert_array_equal(decode(png_with(encoded(PICTURE), xmp)), turned("PNG"))


JPEG_FLAWS = {
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "Photoshop resources cut short": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4"),
    "Photoshop resources beyond their end": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\xff\xff\xff\xff"),
    "broken XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<\xff\0"),
    "second EXIF": segment(0xE1, b"Exif\0\0" + bytes(60)),
    "empty segments": b"".join(segment(marker, b"") for marker in (*range(0xE1, 0xF0), 0xFE)),
    "profile with a missing part": segment(0xE2, b"ICC_PROFILE\0\2\3" + rgb_profile(P3_PRIMARIES)[128:]),
    "profile that is none": segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(300)),
    "broken index of pictures": segment(0xE2, b"MPF\0" + bytes(30)),
    "index of pictures that are missing": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0" + b"\1\xb0\4\0\1\0\0\0\7\0\0\0"),
    "large comments": segment(0xFE, bytes(65533)) * 50,
}


@pytest.mark.parametrize("flaw", JPEG_FLAWS)
def test_a_flaw_of_a_jpeg_costs_neither_pixels_nor_orientation(flaw: str) -> None:
    told = segment(0xE1, b"Exif\0\0" + exif((0x0112, 3, 1, b"\6\0")))
    content = jpeg_with(encoded(PICTURE, "JPEG"), told, JPEG_FLAWS[flaw])
    np.testing.assert_array_equal(decode(content), turned("JPEG"))


EXIF_FLAWS = {
    "a tag before it points outside": exif((0x010F, 2, 99, b"\xff\xff\xff\x7f"), (0x0112, 3, 1, b"\6\0")),
    "a tag before it is of no type": exif((0x010F, 0, 99, b"\xff\xff\xff\x7f"), (0x0112, 3, 1, b"\6\0")),
    "a tag before it has a huge count": exif((0x010F, 5, 2**32 - 1, b"\x1a"), (0x0112, 3, 1, b"\6\0")),
    "its other directory is outside": exif((0x0112, 3, 1, b"\6\0"), (0x8769, 4, 1, b"\xff\xff\xff\x7f")),
    "its other directory is text": exif((0x0112, 3, 1, b"\6\0"), (0x8769, 2, 4, b"abc")),
    "its other directory is itself": exif((0x0112, 3, 1, b"\6\0"), (0x8769, 4, 1, b"\x08")),
    "its next directory is itself": exif((0x0112, 3, 1, b"\6\0"), after=b"\x08\0\0\0"),
    "resolutions are text": exif((0x0112, 3, 1, b"\6\0"), (0x011A, 2, 4, b"abc"), (0x0128, 2, 2, b"2")),
    "big-endian": exif((0x0112, 3, 1, b"\0\6"), order=">"),
    "more entries than there are": exif((0x0112, 3, 1, b"\6\0"))[:8] + b"\xff\xff" + exif((0x0112, 3, 1, b"\6\0"))[10:],
    "cut short after it": exif((0x0112, 3, 1, b"\6\0"), (0x8769, 4, 1, b"\x08"))[:22],
}  # fmt: skip


@pytest.mark.parametrize("flaw", EXIF_FLAWS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_flaw_of_exif_costs_not_the_orientation(kind: str, flaw: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = encoded(PICTURE, kind, exif=b"Exif\0\0" + EXIF_FLAWS[flaw], **KINDS[kind])
        np.testing.assert_array_equal(decode(content), turned(kind))


NO_EXIF = [b"", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", bytes(64), b"MM\0*\0\0\0\x08\xff", b"text", b"Exif\0\0" * 3]


@pytest.mark.parametrize("content", NO_EXIF, ids=range(len(NO_EXIF)))
@pytest.mark.parametrize("kind", KINDS)
def test_exif_that_is_none_is_ignored(kind: str, content: bytes) -> None:
    valid = exif((0x0112, 3, 1, b"\1\0"), (0x010E, 2, 4, b"abcd"))
    if kind == "TIFF":
        file = with_tag(encoded(PICTURE, kind), (0x8769, 7, len(content), content[:4]))
    else:
        plain = encoded(PICTURE, kind, exif=b"Exif\0\0" + valid, **KINDS[kind])
        place = max(plain.find(start) for start in (b"II*\0", b"MM\0*"))
        file = {
            "PNG": png_with(encoded(PICTURE), chunk(b"eXIf", content)),
            "JPEG": jpeg_with(encoded(PICTURE, "JPEG"), segment(0xE1, b"Exif\0\0" + content)),
        }.get(kind) or plain[:place] + content[:26].ljust(26, b"\0") + plain[place + 26 :]
    np.testing.assert_array_equal(decode(file), pixels(kind))


TIFF_FLAWS = {
    "resolution of text": ((282, 2, 4, b"abc"), (283, 2, 4, b"abc"), (296, 3, 1, b"\3")),
    "resolution without a divisor": ((282, 5, 1, b"\x08"), (283, 5, 1, b"\xff\xff\xff\xff"), (296, 3, 1, b"\2")),
    "tags of no type": tuple((tag, 77, 5, b"abcd") for tag in (270, 271, 305, 306)),
    "profile of numbers": ((34675, 3, 2, b"abcd"),),
    "profile outside": ((34675, 7, 10**6, b"\xff\xff\xff\x7f"),),
    "EXIF outside": ((34665, 4, 1, b"\xff\xff\xff\x7f"),),
    "EXIF of text": ((34665, 2, 4, b"abcd"),),
    "EXIF and GPS in itself": ((34665, 4, 1, b"\x08"), (34853, 4, 1, b"\x08")),
    "other images outside": ((330, 4, 2, b"\xff\xff\xff\x7f"),),
    "text outside": ((270, 2, 2**32 - 1, b"\x08"),),
}


@pytest.mark.parametrize("flaw", TIFF_FLAWS)
def test_a_flaw_of_a_tiff_costs_neither_pixels_nor_orientation(flaw: str) -> None:
    plain = encoded(PICTURE, "TIFF")
    content = with_tag(plain, (0x0112, 3, 1, b"\6\0"), *TIFF_FLAWS[flaw])
    np.testing.assert_array_equal(decode(content), turned("TIFF"))
    in_circles = content[:-4] + content[4:8]
    np.testing.assert_array_equal(decode(in_circles), turned("TIFF"))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "zstd"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_a_tiff_without_its_metadata_has_the_same_pixels(mode: str, compression: str) -> None:
    image = (PICTURE if mode not in ("I;16", "LA") else PICTURE.convert("L")).convert(mode)
    try:
        content = encoded(image, "TIFF", compression=compression, big_tiff=mode == "RGB")
    except (OSError, RuntimeError):
        pytest.skip("Pillow does not write it")
    with Image.open(io.BytesIO(content)) as plain:
        expected = np.asarray(plain.convert("RGB")) if mode != "I;16" else np.round(np.asarray(plain) / 257)
    found = decode(content) if mode != "I;16" else decode(content)[:, :, 0]
    if mode not in ("RGBA", "LA"):
        np.testing.assert_array_equal(found, expected)


def test_a_webp_that_ends_in_the_middle_of_its_metadata_has_its_pixels() -> None:
    told = b"Exif\0\0" + exif((0x0112, 3, 1, b"\6\0"))
    content = encoded(PICTURE, "WEBP", lossless=True, exif=told, icc_profile=rgb_profile(P3_PRIMARIES), xmp=XMP)
    assert decode(content).shape == TURNED
    without_profile = encoded(PICTURE, "WEBP", lossless=True, exif=told, xmp=XMP)
    np.testing.assert_array_equal(decode(without_profile[:-40]), turned("WEBP"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_no_byte_of_metadata_costs_an_image(kind: str) -> None:
    told = exif((0x010F, 2, 4, b"abcd"), (0x0112, 3, 1, b"\6\0"), (0x011A, 5, 1, b"\x26"), (0x8769, 4, 1, b"\x08"))
    options: dict[str, object] = {**KINDS[kind], "exif": b"Exif\0\0" + told + bytes(8)}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", "x" * 50, zip=True)
        info.add_itxt("workflow", "x" * 50)
        options["pnginfo"] = info
    if kind in ("JPEG", "WEBP"):
        options["xmp"] = XMP
    content, plain = encoded(PICTURE, kind, **options), pixels(kind)
    places = [
        place
        for name, begin, end in (
            (b"II*\0", 0, len(told)),
            (b"parameters", 0, 20),
            (b"workflow", 0, 60),
            (XMP, 0, len(XMP)),
        )
        if kind != "TIFF" and (at := content.find(name)) >= 0
        for place in range(at + begin, at + end)
    ]
    if kind == "TIFF":
        tags = (270, 271, 282, 305, 34665, 34675)
        content = with_tag(encoded(PICTURE, kind), *((tag, 2, 4, b"abcd") for tag in tags))
        names = {struct.pack("<H", tag) for tag in tags}
        entries = [
            place for place in range(len(content) - 300, len(content) - 12) if content[place : place + 2] in names
        ]
        places = [place + i for place in entries for i in range(2, 12)]
    assert len(places) > 50
    for place in places:
        for bits in (0xFF, 0x01, 0x80):
            changed = content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]
            found = decode(changed)
            assert np.array_equal(np.sort(found, axis=None), np.sort(plain, axis=None)), (place, bits)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_that_are_cut_short_stay_unreadable(kind: str) -> None:
    noise = Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind, **KINDS[kind])
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImageError):
            decode(content[: round(len(content) * share)])


def test_a_decompression_bomb_stays_unreadable() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    with pytest.raises(UnreadableImageError, match="DecompressionBomb"):
        decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))
