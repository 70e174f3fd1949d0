"""Pixels become what people see: sRGB by their profile, 8 bits by their range, over white."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dvdp.data.sources import UnreadableImageError, decode
from tests.data.support import (
    P3_PRIMARIES,
    SRGB_PRIMARIES,
    chunk,
    encoded,
    gamma,
    icc,
    png_with,
    rgb_profile,
)

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
P3 = rgb_profile(P3_PRIMARIES)
SRGB_CREATED = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def coded(values: np.ndarray) -> np.ndarray:
    values = np.clip(values, 0, 1)
    return 255 * np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def from_p3(pixels: np.ndarray) -> np.ndarray:
    matrix = np.linalg.inv(np.array(SRGB_PRIMARIES).T) @ np.array(P3_PRIMARIES).T
    return coded(linear(pixels / 255) @ matrix.T)


#: The curve of sRGB as older profiles have it.
TABLE = (
    b"curv\0\0\0\0"
    + struct.pack(">I", 1024)
    + np.round(65535 * linear(np.linspace(0, 1, 1024))).astype(">u2").tobytes()
)


def difference(image: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(image - expected).max())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_display_p3_becomes_srgb_in_every_format(kind: str) -> None:
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    plain = decode(encoded(Image.fromarray(COLOURS), kind, **options.get(kind, {"quality": 100, "subsampling": 0})))
    converted = decode(
        encoded(Image.fromarray(COLOURS), kind, icc_profile=P3, **options.get(kind, {"quality": 100, "subsampling": 0}))
    )
    assert difference(converted, plain) > 50
    assert difference(converted, from_p3(plain)) <= 2


@pytest.mark.parametrize(
    "profile",
    [
        SRGB_CREATED,
        rgb_profile(SRGB_PRIMARIES),
        rgb_profile(np.round(SRGB_PRIMARIES, 4)),
        rgb_profile(SRGB_PRIMARIES, TABLE),
    ],
    ids=["littleCMS", "by hand", "rounded", "table"],
)
def test_a_profile_of_srgb_changes_nothing(profile: bytes) -> None:
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(COLOURS), icc_profile=profile)), COLOURS)


def test_grey_is_converted_by_a_profile_of_grey() -> None:
    def kind(curve: bytes) -> bytes:
        return icc(b"GRAY", {b"kTRC": curve})

    expected = np.repeat(coded((RAMP / 255) ** 1.8)[:, :, None], 3, axis=2)
    image = decode(encoded(Image.fromarray(RAMP), icc_profile=kind(gamma(1.8))))
    assert difference(image, expected) <= 2
    sixteen = decode(encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), icc_profile=kind(gamma(1.8))))
    np.testing.assert_array_equal(sixteen, image)
    with_alpha = Image.fromarray(np.stack([RAMP, np.where(RAMP < 128, 0, 255).astype(np.uint8)], axis=2))
    over_white = decode(encoded(with_alpha, icc_profile=kind(gamma(1.8))))
    np.testing.assert_array_equal(over_white, np.where(RAMP[:, :, None] < 128, 255, image))
    # Half an octave from the curve of sRGB in shadows, and yet not it.
    assert difference(decode(encoded(Image.fromarray(RAMP), icc_profile=kind(gamma(2.2)))), RAMP[:, :, None]) > 3


def cmyk_profile() -> bytes:
    """Ink by ink, from 16 corners: the lightness falls with all inks, and cyan and yellow have a hue."""
    grid = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    lightness = 100 * np.prod(1 - grid * [0.4, 0.5, 0.1, 0.95], axis=1)
    lab = np.stack([lightness * 2.55, 128 + grid @ [-30, 60, 0, 0] / 1.5, 128 + grid @ [-40, 0, 80, 0] / 1.5], axis=1)
    table = np.clip(np.round(lab), 0, 255).astype(np.uint8).tobytes()
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * i for i in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return icc(b"CMYK", {b"A2B0": lut})


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_by_their_profile(kind: str) -> None:
    inks = Image.new("CMYK", (40, 8))
    corners = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    for i, ink in enumerate(corners):
        inks.paste(ink, (8 * i, 0, 8 * i + 8, 8))
    profile = cmyk_profile()
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = decode(encoded(inks, kind, icc_profile=profile, **options))[4, 4::8]
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    colours = Image.frombytes("CMYK", (5, 1), np.array(corners, np.uint8).tobytes())
    expected = np.asarray(ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))
    assert difference(image, expected[0].astype(int)) <= 3
    assert image[0].min() > 250
    assert image[4].max() < 40
    assert difference(image, decode(encoded(inks, kind, **options))[4, 4::8].astype(int)) > 60


def test_transparent_pixels_and_palettes_are_converted_too() -> None:
    alpha = np.where(RAMP < 100, 0, 255).astype(np.uint8)
    image = decode(encoded(Image.fromarray(np.dstack([COLOURS, alpha])), icc_profile=P3))
    expected = np.where(alpha[:, :, None] == 0, 255, from_p3(COLOURS))
    assert difference(image, expected) <= 2
    palette = Image.fromarray(COLOURS).quantize(256)
    plain = np.asarray(palette.convert("RGB"))
    assert difference(decode(encoded(palette, icc_profile=P3)), from_p3(plain)) <= 2


def flat(curve: bytes) -> bytes:
    return rgb_profile(SRGB_PRIMARIES, curve)


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile",
        P3[:200],
        P3[:-60],
        P3[:36] + b"nope" + P3[40:],
        bytes(len(P3)),
        icc(b"RGB", {}),
        icc(b"GRAY", {b"kTRC": gamma(1.0)}),
        cmyk_profile(),
        rgb_profile([(0, 0, 0)] * 3),
        rgb_profile(SRGB_PRIMARIES, b"curv\0\0\0\0\0\0\0\2\0\0\0\0"),
    ],
    ids=["text", "head", "cut", "signature", "zeros", "empty", "of grey", "of inks", "no primaries", "black"],
)
def test_a_broken_profile_and_one_of_other_colours_are_ignored(profile: bytes) -> None:
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(COLOURS), icc_profile=profile)), COLOURS)


# Numbers of other ranges


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """Uncompressed grey of any type; tags are (photometric, bits)."""
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    bits = tags.get("bits", pixels.dtype.itemsize * 8)
    data = pixels.tobytes()
    entries = [
        (256, 3, pixels.shape[1]), (257, 3, pixels.shape[0]), (258, 3, bits), (259, 3, 1),
        (262, 3, tags.get("photometric", 1)), (273, 4, 8 + 2 + 9 * 12 + 4), (278, 3, pixels.shape[0]),
        (279, 4, len(data)), (339, 3, kind),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + data


RANGES = {
    "16 bits": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "16 bits, big-endian": encoded(Image.fromarray((RAMP.astype(np.uint16) * 257).astype(">u2")), "TIFF"),
    "16 bits, white is 0": tiff(65535 - RAMP.astype(np.uint16) * 257, photometric=0),
    "16 bits in 32": tiff(RAMP.astype(np.int32) * 257),
    "8 bits in 32": tiff(RAMP.astype(np.int32)),
    "8 bits in 32, unsigned": tiff(RAMP.astype(np.uint32)),
    "floats to 1": tiff((RAMP / 255).astype(np.float32)),
    "floats to 1, white is 0": tiff((1 - RAMP / 255).astype(np.float32), photometric=0),
    "floats to 255": tiff(RAMP.astype(np.float32)),
    "floats of a PFM": b"Pf\n16 16\n-1.0\n" + (RAMP[::-1] / 255).astype("<f4").tobytes(),
    "PGM of 12 bits": b"P5 16 16 4080 " + (RAMP.astype(np.uint16) * 16).astype(">u2").tobytes(),
    "dark PGM of 16 bits": b"P5 16 16 65535 " + ((RAMP.astype(np.uint16) * 257).astype(">u2")).tobytes(),
    "16 bits in JPEG 2000": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "JPEG2000"),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_are_scaled_by_their_range(name: str) -> None:
    np.testing.assert_array_equal(decode(RANGES[name]), np.repeat(RAMP[:, :, None], 3, axis=2))


def test_twelve_bits_of_a_tiff_are_white_at_4095() -> None:
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])  # 4095, 0, 2048, 0.
    content = tiff(np.zeros((1, 4), np.uint16), bits=12)[:-8] + packed
    assert decode(content)[0, :, 0].tolist() == [255, 0, 128, 0]


def test_a_dark_image_of_16_bits_stays_dark() -> None:
    for dark in (np.full((4, 4), 200, np.uint16), np.full((4, 4), 200, ">u2")):
        assert (decode(encoded(Image.fromarray(dark), "TIFF")) == 1).all()
    assert (decode(b"P5 2 2 65535 " + np.full(4, 200, ">u2").tobytes()) == 1).all()


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((4, 4), 10**6, np.int32), "32-bit pixels from 1000000 to 1000000, expected 0 to 255 or 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "32-bit pixels from -1 to -1"),
        (np.full((4, 4), 7, np.int16), "signed pixels of 8 or 16 bits, whose range is not known"),
        (np.full((4, 4), 7, np.int8), "signed pixels of 8 or 16 bits"),
        (np.array([[0, 2.5]], np.float32), "floating-point pixels from 0 to 2.5, expected 0 to 1, or whole ones"),
        (np.array([[-0.5, 1]], np.float32), "floating-point pixels from -0.5 to 1"),
        (np.array([[0, 1]], np.float32), "floating-point pixels from 0 to 1"),
        (np.array([[0, np.nan]], np.float32), "floating-point pixels from nan"),
        (np.array([[0, np.inf]], np.float32), "floating-point pixels from 0 to inf"),
    ],
)  # fmt: skip
def test_numbers_of_unknown_range_say_so(pixels: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode(tiff(pixels))


def test_a_kind_of_tiff_that_pillow_does_not_read_is_called_so() -> None:
    content = tiff(np.ones((4, 4), np.float64))
    with pytest.raises(UnreadableImageError, match=r"known format \(TIFF, damaged or of a kind that Pillow does not"):
        decode(content)


# Transparency


def grey_png(depth: int, rows: bytes, transparent: int) -> bytes:
    """Two pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + rows))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", struct.pack(">H", transparent)) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "rows", "transparent", "expected"),
    [
        (1, b"\x40", 0, [255, 255]),
        (2, b"\x40", 1, [255, 0]),
        (4, b"\x70", 7, [255, 0]),
        (8, b"\x70\x00", 0x70, [255, 0]),
        (16, b"\x12\x34\x12\x35", 0x1234, [255, 18]),
    ],
)
def test_a_grey_that_a_png_declares_transparent_is_white(
    depth: int, rows: bytes, transparent: int, expected: list[int]
) -> None:
    assert decode(grey_png(depth, rows, transparent))[0, :, 0].tolist() == expected


def test_a_colour_that_a_png_declares_transparent_is_white() -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    content = png_with(encoded(Image.fromarray(pixels)), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert decode(content).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    broken = png_with(encoded(Image.fromarray(pixels)), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))[:-1] + b"\0")
    assert decode(broken).tolist() == pixels.tolist()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    of_16_bits = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">6H", 257, 514, 771, 1028, 1285, 1542)))
    transparent = chunk(b"tRNS", struct.pack(">3H", 257, 514, 771))
    assert decode(content[:8] + header + transparent + of_16_bits).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_all_kinds_of_transparency_are_laid_over_white() -> None:
    grey = np.array([[[10, 0], [10, 128], [10, 255]]], np.uint8)
    assert decode(encoded(Image.fromarray(grey)))[0, :, 0].tolist() == [255, 132, 10]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 10, 10] * 3)
    assert decode(encoded(palette, transparency=bytes([0, 128, 255])))[0, :, 0].tolist() == [255, 132, 10]
    frame = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    frame.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(encoded(frame, "GIF", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    for kind, options in (("WEBP", {"lossless": True}), ("TIFF", {})):
        rgba = Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], np.uint8))
        assert decode(encoded(rgba, kind, **options))[0, :, 0].tolist() == [255, 9]
