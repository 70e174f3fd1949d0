"""What image files hold beside their pixels: taken out, so that no flaw in it costs an image.

Pillow reads text, profiles and EXIF before it reads pixels, and refuses the file where one of them is broken or large.
Here they are cut out of PNG, JPEG, TIFF, WebP and AVIF first. Orientation and colour profile alone are used.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from PIL import Image

from dvdp.data.sources.formats import HEAD_BYTES, format_of

#: Of a compressed profile or text; the largest profiles, of printers, have 4 MiB.
_MOST_BYTES = 32 << 20
#: Numbers in EXIF and TIFF by their type, as :mod:`struct` writes them; 2 is text.
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 16: "Q"}
_ORIENTATION, _XMP, _PROFILE = 274, 700, 34675
#: Tags of a TIFF that say how its pixels are stored.
_OF_PIXELS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339),
    *(347, *range(512, 522), *range(529, 533)),
}

#: What brings an image upright, by its orientation in EXIF.
_TURNS: dict[float | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Metadata:
    """Of an image file; empty where it has none, or none that can be read."""

    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""
    """ICC."""

    def upright(self, image: Image.Image) -> Image.Image:
        """Turned as EXIF says, or else XMP; as it is, where neither names one of the eight ways."""
        turn = _TURNS.get(self._orientation())
        return image if turn is None else image.transpose(turn)

    def _orientation(self) -> float | None:
        found: float | None = None
        with contextlib.suppress(struct.error):
            # Some writers put the name of the segment before it, or twice.
            found = _Directory(self.exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")).number(_ORIENTATION)
        if found is None and (match := re.search(rb"""tiff:Orientation(?:=["']|>)\s*([0-9])""", self.xmp)):
            found = int(match[1])
        return found


def without_metadata(content: bytes) -> tuple[bytes, Metadata]:
    """An image file reduced to its pixels, and what was cut out; a file of a kind not known here is left as it is."""
    split = _KINDS.get(format_of(content[:HEAD_BYTES]))
    return split(content) if split else (content, Metadata())


def _png(content: bytes) -> tuple[bytes, Metadata]:
    kept, exif, xmp, profile, depth, colour = [content[:8]], b"", b"", b"", 8, 2
    place = 8
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if end > len(content):
            break
        data = content[place + 8 : end - 4]
        if kind == b"IHDR" and length == 13:
            depth, colour = data[8], data[9]
        if not _is_ancillary(kind):
            kept.append(content[place:end])
        elif zlib.crc32(content[place + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            pass  # As libpng does.
        elif kind == b"tRNS" and len(data) >= {0: 2, 2: 6}.get(colour, 0):
            kept.append(_chunk(kind, _in_8_bits(data, depth, colour)))
        elif kind == b"iCCP":
            profile = _inflated(data.partition(b"\0")[2][1:])
        elif kind == b"eXIf":
            exif = data
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            key, _, text = data.partition(b"\0")
            if key == b"XML:com.adobe.xmp":
                xmp = _text(kind, text)
            elif key == b"Raw profile type exif":
                exif = exif or _from_hex(_text(kind, text))
        place = end
    # What is cut short is cut out as well, unless it is pixels.
    rest = b"" if _is_ancillary(content[place + 4 : place + 8]) else content[place:]
    return b"".join([*kept, rest]), Metadata(exif, xmp, profile)


def _is_ancillary(kind: bytes) -> bool:
    return kind.isalpha() and kind[:1].islower()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _in_8_bits(data: bytes, depth: int, colour: int) -> bytes:
    """The transparent colour, which Pillow compares with pixels that it has brought to 8 bits; grey of 16 it keeps."""
    if colour == 0 and depth in (2, 4) and len(data) == 2:
        return struct.pack(">H", int.from_bytes(data, "big") * 255 // (2**depth - 1) & 255)
    if colour == 2 and depth == 16 and len(data) == 6:
        return struct.pack(">3H", *(value >> 8 for value in struct.unpack(">3H", data)))
    return data


def _text(kind: bytes, text: bytes) -> bytes:
    if kind == b"zTXt":
        return _inflated(text[1:])
    if kind == b"iTXt":
        content = text[2:].split(b"\0", 2)[-1]
        return _inflated(content) if text[:1] == b"\1" else content
    return text


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, _MOST_BYTES)
    except zlib.error:
        return b""
    return content if stream.eof else b""


def _from_hex(text: bytes) -> bytes:
    """Of ImageMagick's ``Raw profile``: an empty line, the name, the length, then hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
    except ValueError:
        return b""


def _jpeg(content: bytes) -> tuple[bytes, Metadata]:
    kept, exif, xmp, parts = [content[:2]], b"", b"", dict[int, bytes]()
    place = 2
    for marker, begin, place in _segments(content):
        data = content[begin + 4 : place]
        # The two that say how colours are stored.
        pixels = (marker == 0xE0 and data[:5] == b"JFIF\0" and len(data) >= 14) or (
            marker == 0xEE and data[:5] == b"Adobe" and len(data) >= 12
        )
        if pixels or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(content[begin:place])
        elif marker == 0xE1 and data.startswith(b"Exif\0\0"):
            exif += data[6:]
        elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp += data[29:]
        elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0") and len(data) > 14:
            parts[data[12]] = data[14:]
    profile = b"".join(part for _, part in sorted(parts.items()))
    return b"".join([*kept, content[place:]]), Metadata(exif, xmp, profile)


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, begin, end) of each segment before the scan."""
    place = 2
    while 0 <= (place := content.find(b"\xff", place)) < len(content) - 4:
        marker = content[place + 1]
        if marker == 0xFF:
            place += 1
        elif marker in (0, 1, *range(0xD0, 0xD9)):  # Of no length.
            place += 2
        else:
            end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
            if marker in (0xD9, 0xDA) or end < place + 4 or end > len(content):
                return
            yield marker, place, end
            place = end


def _webp(content: bytes) -> tuple[bytes, Metadata]:
    kept, found = [b"WEBP"], dict[bytes, bytes]()
    place, end = 12, min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while place + 8 <= end:
        kind, size = struct.unpack_from("<4sI", content, place)
        after = place + 8 + size + size % 2
        data = content[place + 8 : place + 8 + size]
        if kind == b"VP8X":
            # Without the flags of what is cut out.
            kept.append(content[place : place + 8] + bytes([data[0] & ~0x2C] if data else []) + data[1:])
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(content[place:after])
        else:
            found[kind] = data
        place = after
    body = b"".join(kept)
    metadata = Metadata(*(found.get(kind, b"") for kind in (b"EXIF", b"XMP ", b"ICCP")))
    return b"RIFF" + struct.pack("<I", len(body)) + body, metadata


def _avif(content: bytes) -> tuple[bytes, Metadata]:
    # Boxes beside EXIF turn its images: the item gets a type that is not read.
    return re.sub(b"(infe(?:\2.{7}|\3.{9}))Exif", rb"\1free", content, flags=re.DOTALL), Metadata()


def _tiff(content: bytes) -> tuple[bytes, Metadata]:
    try:
        directory = _Directory(content)
    except struct.error:
        return content, Metadata()
    metadata = Metadata(content, directory.value(_XMP), directory.value(_PROFILE))
    kept = directory.written(_OF_PIXELS)
    return content[: directory.place] + kept + content[directory.place + len(kept) :], metadata


class _Directory:
    """The first directory of a TIFF, which EXIF is as well; raises struct.error where there is none."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._order = "<" if content[:2] == b"II" else ">"
        self._big = b"+" in content[2:4]
        self._unsigned = "Q" if self._big else "I"
        (self.place,) = struct.unpack_from(self._order + self._unsigned, content, 8 if self._big else 4)
        size, self._number = (20, "Q") if self._big else (12, "H")
        (number,) = struct.unpack_from(self._order + self._number, content, self.place)
        begin = self.place + struct.calcsize(self._number)
        entries = (content[i : i + size] for i in range(begin, min(begin + number * size, len(content)), size))
        self._entries = {self._unpacked("H", entry, 0): entry for entry in entries if len(entry) == size}

    def value(self, tag: int) -> bytes:
        """Empty if there is none, or it is cut short."""
        if (entry := self._entries.get(tag)) is None:
            return b""
        width = struct.calcsize("=" + _TYPES.get(self._unpacked("H", entry, 2), "s"))
        length, inside = width * self._unpacked(self._unsigned, entry, 4), entry[12 if self._big else 8 :]
        if length <= len(inside):
            return inside[:length]
        begin = self._unpacked(self._unsigned, inside, 0)
        return self._content[begin : begin + length] if begin + length <= len(self._content) else b""

    def number(self, tag: int) -> float | None:
        """The first of a value, of whatever type, and be it text; None if there is none."""
        value = self.value(tag)
        kind = self._unpacked("H", self._entries[tag], 2) if value else 0
        text = value.strip(b" \0")
        if kind == 2 or (kind == 7 and text.isdigit()):
            return int(text) if text.isdigit() and len(text) < 10 else None
        try:
            first, *divisor = struct.unpack_from(self._order + _TYPES[kind], value)
            return float(first / divisor[0] if divisor else first)
        except (KeyError, struct.error, ZeroDivisionError):
            return None

    def written(self, tags: Collection[int]) -> bytes:
        """The directory with these tags alone, and none after it."""
        kept = [entry for tag, entry in self._entries.items() if tag in tags]
        number = struct.pack(self._order + self._number, len(kept))
        return number + b"".join(kept) + bytes(struct.calcsize("=" + self._unsigned))

    def _unpacked(self, form: str, data: bytes, place: int) -> int:
        number: int = struct.unpack_from(self._order + form, data, place)[0]
        return number


_KINDS: dict[str | None, Callable[[bytes], tuple[bytes, Metadata]]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "TIFF": _tiff,
    "WEBP": _webp,
    "AVIF": _avif,
}
