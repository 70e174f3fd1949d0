"""Every member of a folder or an archive is read or counted with its reason, and no damage to an archive is missed."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvdp.config import DatasetParams
from dvdp.data.prepare import prepare
from dvdp.data.sources import SOURCES, ImageFolder, Item, UnreadableImageError
from dvdp.data.sources import files as files_module
from dvdp.data.sources.files import fingerprint, image_files, members
from dvdp.data.sources.formats import FORMATS, format_of, formats
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from tests.data.support import add_link, encoded, make_images, make_tar, make_zip, png

GREY = Image.new("L", (8, 8), 100)
RGB = Image.new("RGB", (8, 8), (100, 100, 100))


def tally(path: Path) -> dict[str, list[str]]:
    """Names by reason; of images, by "read"."""
    found: dict[str, list[str]] = {}
    for member in members(path):
        found.setdefault(member.left_out or "read", []).append(member.name)
    return {reason: sorted(names) for reason, names in found.items()}


def unpacked(root: Path, files: dict[str, bytes | None]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content or b"")
    return root


def everywhere(root: Path, files: dict[str, bytes | None]) -> list[Path]:
    """The same files as a folder, a tar, a compressed tar and a zip."""
    return [
        unpacked(root / "folder", files),
        make_tar(root / "x.tar", files),
        make_tar(root / "x.tar.gz", files, "w:gz"),
        make_zip(root / "x.zip", files),
    ]


# What is read, and what is left out


def test_every_file_is_read_or_left_out_with_its_reason(tmp_path: Path) -> None:
    files: dict[str, bytes | None] = {
        "cat/a.png": png(),
        "cat/a.seg.png": png(),
        "cat/b.jpg": encoded(RGB, "JPEG"),
        "cat/b_mask.png": png(),
        "cat/b_mask_1.png": png(),
        "cat/b-thumb.jpg": png(),
        "cat/b-150x150.jpg": png(),
        "cat/c_mask.png": png(),
        "cat/notes.txt": b"no image",
        "cat/Thumbs.db": b"x",
        "cat/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": png(),
        "cat/.a.png": png(),
        ".git/x.png": png(),
        "__MACOSX/cat/._a.png": b"x",
        "dog/mask.png": png(),
        "dog/noname": png(),
        "dog/odd.dat": encoded(RGB, "WEBP"),
        "dog/empty": b"",
        "dataset.json": b"{}",
        "raw.nef": encoded(RGB, "TIFF"),
        "figure.eps": encoded(RGB, "EPS"),
    }
    expected = {
        "read": ["cat/a.png", "cat/b.jpg", "cat/c_mask.png", "dog/mask.png", "dog/noname", "dog/odd.dat"],
        "mask": ["cat/a.seg.png", "cat/b_mask.png", "cat/b_mask_1.png"],
        "thumbnail": [
            "cat/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "cat/Thumbs.db", "cat/b-150x150.jpg", "cat/b-thumb.jpg",
        ],
        "hidden": [".git/x.png", "__MACOSX/cat/._a.png", "cat/.a.png"],
        "other format": ["cat/notes.txt", "dataset.json", "dog/empty", "figure.eps", "raw.nef"],
    }  # fmt: skip
    for path in everywhere(tmp_path, files):
        assert tally(path) == expected, path
        assert sorted(name for name, _ in image_files(path)) == expected["read"]
        assert [content for name, content in ((m.name, m.read()) for m in members(path)) if name == "dog/odd.dat"] == [
            files["dog/odd.dat"]
        ]


def test_a_mask_is_one_only_beside_its_image_whichever_comes_first(tmp_path: Path) -> None:
    files: dict[str, bytes | None] = {"a.mask.png": png(), "x/b.png": png(), "b_seg.png": png(), "a.webp": png()}
    for path in everywhere(tmp_path, files):
        assert tally(path) == {"mask": ["a.mask.png"], "read": ["a.webp", "b_seg.png", "x/b.png"]}


def test_sidecar_files_are_read_as_they_pass(tmp_path: Path) -> None:
    files: dict[str, bytes | None] = {"a.png": png(1), "a.cls": b"7", "b.png": png(2), "dataset.json": b'{"labels": 1}'}
    for path in everywhere(tmp_path, files):
        assert {member.name: member.read() for member in members(path)} == files


def test_links_and_members_that_are_no_files_are_counted(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {"a.png": png(), "../evil.png": png(), "/etc/evil.png": png()})
    with tarfile.open(path, "a") as archive:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("p.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            archive.addfile(member)
    expected = {"read": ["a.png"], "outside": ["../evil.png", "/etc/evil.png"], "link": ["l.png"]}
    assert tally(path) == {**expected, "hard link": ["h.png"], "no file": ["p.png"]}
    path = make_zip(tmp_path / "x.zip", {"a.png": png(), "../evil.png": png(), "/etc/evil.png": png()})
    add_link(path, "l.png", "a.png")
    assert tally(path) == expected


def test_backslashes_of_zips_from_windows_separate_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for system, name in ((0, "cat\\"), (0, "cat\\a.png"), (0, "..\\evil.png"), (3, "dog/b\\c.png")):
            member = zipfile.ZipInfo(name)
            member.create_system = system
            archive.writestr(member, png())
    assert tally(tmp_path / "x.zip") == {"read": ["cat/a.png", "dog/b\\c.png"], "outside": ["../evil.png"]}


def test_a_part_of_an_archive_counts_its_own_members_alone(tmp_path: Path) -> None:
    files: dict[str, bytes | None] = {"train/a.png": png(), "train/a.txt": b"x", "test/b.png": png(), "c.txt": b"x"}
    for path in everywhere(tmp_path, files):
        assert tally(path / "train") == {"read": ["a.png"], "other format": ["a.txt"]}


@pytest.mark.parametrize("suffix", ["", ".bin", ".jpg"])
def test_formats_are_known_by_content(tmp_path: Path, suffix: str) -> None:
    Image.init()
    names = [name for name in FORMATS if name in Image.SAVE and name not in ("TGA", "PPM", "XPM")]
    files: dict[str, bytes | None] = {f"{name}{suffix}": encoded(RGB, name) for name in names}
    ends = {1: b"1", 2: b"1 1", 3: b"1 1 1 1", 4: b"1", 5: b"1 1", 6: b"1 123"}
    files |= {f"P{i}{suffix}": f"P{i} 1 1\n".encode() + end for i, end in ends.items()}
    files[f"xpm{suffix}"] = (
        b'/* XPM */\nstatic char *x[] = {\n"8 8 1 1",\n"a c #646464",\n' + b'"aaaaaaaa",\n' * 8 + b"};"
    )
    assert {"AVIF", "JPEG2000", "ICO", "DDS", "QOI", "PCX", "SGI"} <= set(names)
    path = unpacked(tmp_path, files)
    for item in SOURCES["image_folder"](path):
        assert item.load().shape[2] == 3, item.name
    assert set(tally(path)) == {"read"}


def test_tga_is_known_by_its_suffix(tmp_path: Path) -> None:
    unpacked(tmp_path, {"a.tga": encoded(RGB, "TGA"), "b": encoded(RGB, "TGA")})
    assert tally(tmp_path) == {"read": ["a.tga"], "other format": ["b"]}
    assert [item.load()[0, 0, 0] for item in SOURCES["image_folder"](tmp_path)] == [100]


def test_text_that_looks_like_an_image_is_none() -> None:
    for text in (
        b"BMW cars",
        b"P1 is",
        b"GIFs",
        b"MM",
        b"icing",
        b"\n\n\n",
        b"ftyp",
        b"",
        b"#define x 1",
        b"%!PS-Adobe",
    ):
        assert format_of(text) is None or text == b"icing"


def test_no_decoder_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gs", "gswin32c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    unpacked(tmp_path / "x", {"a.png": encoded(RGB, "EPS"), "b.jpg": encoded(RGB, "EPS")})
    for item in SOURCES["image_folder"](tmp_path / "x"):
        with pytest.raises(UnreadableImageError, match="no image in a known format"):
            item.load()
    assert not (tmp_path / "started").exists()
    assert not {"EPS", "WMF", "IPTC", "MPEG", "HDF5", "GRIB", "BUFR"} & set(formats())


@pytest.mark.skipif(bool({"HEIF", "JXL"} & set(formats())), reason="the plugins are installed")
def test_formats_of_plugins_name_the_extra_to_install(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)
    unpacked(tmp_path, {"a.heic": heic, "b.jxl": b"\xff\x0a" + bytes(50), "c.png": png(), "d.jpg": heic})
    assert tally(tmp_path) == {
        "HEIF, which needs the extra heic (`pip install pillow-heif`)": ["a.heic"],
        "JXL, which needs the extra jxl (`pip install pillow-jxl-plugin`)": ["b.jxl"],
        "read": ["c.png", "d.jpg"],
    }
    *_, last = SOURCES["image_folder"](tmp_path)
    with pytest.raises(UnreadableImageError, match=r"HEIF, which needs the extra heic \(`pip install pillow-heif`\)"):
        last.load()
    (tmp_path / "c.png").unlink()
    (tmp_path / "d.jpg").unlink()
    with pytest.raises(
        UserError, match=r"found no images in .*1 HEIF, which needs the extra heic \(`pip install pillow-heif`\)"
    ):
        SOURCES["image_folder"](tmp_path)


@pytest.mark.skipif(not {"HEIF", "JXL"} <= set(formats()), reason="needs the extras heic and jxl")
def test_formats_of_plugins_are_read(tmp_path: Path) -> None:
    unpacked(tmp_path, {"a.heic": encoded(RGB, "HEIF"), "b": encoded(RGB, "JXL"), "c.jpg": encoded(RGB, "HEIF")})
    assert [abs(int(item.load()[0, 0, 0]) - 100) <= 3 for item in SOURCES["image_folder"](tmp_path)] == [True] * 3


def test_the_report_has_totals_and_names_by_reason(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 3)
    for i in range(150):
        (images / "cat" / f"{i}.txt").write_text("a caption")
    for i in range(2):
        (images / "dog" / f"broken{i}.png").write_bytes((images / "dog" / "000.png").read_bytes()[: 300 + i])
    (images / ".hidden").touch()
    params = DatasetParams(name="pets", source="image_folder", path=images, resolution=16, max_skipped=0.5)
    prepare(params, tmp_path / "store", tmp_path / "prepare.json")
    found = json.loads((tmp_path / "prepare.json").read_text())
    assert {entry["reason"]: entry["files"] for entry in found["left_out"]} == {"hidden": 1, "other format": 150}
    assert [len(entry["names"]) for entry in found["left_out"]] == [1, 100]
    (skipped,) = found["skipped_reasons"]
    assert skipped["images"] == found["skipped"] == 2
    assert "truncated" in skipped["reason"]


def test_names_that_are_no_text_do_not_break_the_report(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 2)
    shutil.copytree(images / "cat", images / os.fsdecode(b"caf\xe9"))
    (images / "cat" / os.fsdecode(b"\xe9.png")).write_bytes(b"no image")
    params = DatasetParams(name="pets", source="image_folder", path=images, resolution=16, max_skipped=0.5)
    assert prepare(params, tmp_path / "store", tmp_path / "prepare.json").labels == ("caf\\xe9", "cat", "dog")
    assert [*json.loads((tmp_path / "prepare.json").read_text())["skipped_images"]] == ["cat/\\xe9.png"]
    assert len(ImageStore(tmp_path / "store")) == 6


# One entry's trouble


def test_an_entry_that_cannot_be_read_is_left_out_alone(tmp_path: Path) -> None:
    unpacked(tmp_path, {"a.png": png(), "z/b.png": png()})
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "long.png").symlink_to("x" * 300)
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "z" / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.png")
    assert tally(tmp_path) == {
        "read": ["a.png", "circle.png", "long.png", "z/b.png"],
        "unreadable (Too many levels of symbolic links)": ["circle"],
        "unreadable (No such file or directory)": ["gone"],
        "link": ["z/up"],
        "no file": ["pipe", "pipe.png"],
    }
    reasons = []
    for item in SOURCES["image_folder"](tmp_path):
        try:
            item.load()
        except UnreadableImageError as error:
            reasons.append(str(error))
    assert reasons == ["Too many levels of symbolic links", "File name too long"]


def test_folders_deeper_than_a_path_may_be_are_counted(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    (tmp_path / "a.png").write_bytes(png())
    try:
        found = tally(tmp_path)
        assert found.pop("read") == ["a.png"]
        assert [*found] == ["unreadable (File name too long)"]
        assert len(fingerprint(tmp_path)) == 64
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Too deep for shutil.


def test_a_folder_without_the_right_to_list_it_is_counted(tmp_path: Path) -> None:
    unpacked(tmp_path, {"a.png": png(), "locked/b.png": png(), "secret": png()})
    (tmp_path / "locked").chmod(0)
    (tmp_path / "secret").chmod(0)
    if os.access(tmp_path / "secret", os.R_OK):
        pytest.skip("this user may read everything")
    assert tally(tmp_path) == {"read": ["a.png"], "unreadable (Permission denied)": ["locked", "secret"]}
    (tmp_path / "locked").chmod(0o755)


@pytest.mark.parametrize("gone", ["cat/002.png", "dog/001.png"])
def test_a_file_that_vanishes_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    images = make_images(tmp_path / "pets", 3)

    class Vanishing(ImageFolder):
        """Loses a file once they are counted, or once the folder of the first is listed."""

        def __iter__(self) -> Iterator[Item]:
            for item in super().__iter__():
                (images / gone).unlink(missing_ok=True)
                yield item

    monkeypatch.setitem(SOURCES, "vanishing", Vanishing)
    params = DatasetParams(name="pets", source="vanishing", path=images, resolution=16, max_skipped=0.5)
    metadata = prepare(params, tmp_path / "store", tmp_path / "prepare.json")
    assert (metadata.count, metadata.skipped) == (5, 1)
    assert json.loads((tmp_path / "prepare.json").read_text())["images_found"] == 6


def test_a_file_that_is_too_long_for_memory_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_MOST_BYTES", 1000)
    for path in everywhere(tmp_path, {"a.png": png(), "long.png": bytes(1001), "long": png() + bytes(1001)}):
        for member in members(path):
            if member.name.startswith("long"):
                with pytest.raises(UnreadableImageError, match="longer than 1,000 bytes"):
                    member.read()
            else:
                assert member.read() == png()


@pytest.mark.parametrize("path", ["x" * 300, "circle", "circle/below"])
def test_a_source_with_a_path_that_cannot_be_is_one_sentence(tmp_path: Path, path: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match=r"^dataset\.path: "):
        list(members(tmp_path / path))


# Damage


def pictures(count: int = 40) -> dict[str, bytes | None]:
    """Of lengths that are multiples of 512 bytes too."""
    draw = random.Random(0)
    return {f"set/{i:03d}.png": png(i) + draw.randbytes(512 - len(png(i)) if i % 4 == 0 else 700) for i in range(count)}


def read(path: Path) -> int:
    """Images whose content was given."""
    return sum(1 for _, read in image_files(path) if read())


def fails(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"dataset.path: '{path}' is no tar or zip, or a damaged one (")
    return str(error.value)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
}  # fmt: skip


def tar_bytes(files: dict[str, bytes | None], **options: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_whole_tar_is_read_whole(tmp_path: Path, kind: str) -> None:
    whole = tar_bytes(pictures())
    ends = {"as written": whole, "one block": whole.rstrip(b"\0"), "padded": whole + bytes(100_000)}
    ends["one block"] += bytes(-len(ends["one block"]) % 512 + 512)
    for name, content in ends.items():
        (tmp_path / "x").write_bytes(COMPRESSIONS[kind](content))
        assert read(tmp_path / "x") == 40, name
    half = len(whole) // 2
    (tmp_path / "x").write_bytes(
        whole if kind == "tar" else COMPRESSIONS[kind](whole[:half]) + COMPRESSIONS[kind](whole[half:])
    )
    assert read(tmp_path / "x") == 40
    if kind in ("gz", "xz"):
        (tmp_path / "x").write_bytes(COMPRESSIONS[kind](whole) + bytes(512))
        assert read(tmp_path / "x") == 40


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_flipped_byte_in_any_header_of_a_tar_is_named(tmp_path: Path, kind: str) -> None:
    whole = tar_bytes(pictures())
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        starts = [member.offset for member in archive.getmembers()]
    for start in (starts[1], starts[25], starts[-1]):
        for place in (0, 5, 100, 124, 135, 148, 156, 257, 300, 511):
            damaged = bytearray(whole)
            damaged[start + place] ^= 0x41
            (tmp_path / "x").write_bytes(COMPRESSIONS[kind](bytes(damaged)))
            text = fails(tmp_path / "x")
    assert "bad checksum after 'set/038.png', at byte" in text


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_tar_that_is_cut_or_goes_on_is_named(tmp_path: Path, kind: str) -> None:
    whole, compress = tar_bytes(pictures()), COMPRESSIONS[kind]
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        middle, last = (archive.getmembers()[i].offset for i in (20, -1))
    members_end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    damaged = {
        "between members": compress(whole[:last]),
        "in a header": compress(whole[: last + 300]),
        "in an image": compress(whole[: last + 600]),
        "without an end": compress(whole[:members_end]),
        "zeros in the middle": compress(whole[:middle] + bytes(512) + whole[middle + 512 :]),
        "two": compress(whole + whole),
        "two of the kind": compress(whole) + compress(whole),
        "a word": compress(whole) + b"a word",
        "a block": compress(whole) + b"\1" * 1024,
        "half": compress(whole)[: len(compress(whole)) // 2],
        "without its last byte": compress(whole.rstrip(b"\0"))[:-1],
        "nothing": compress(b""),
    }
    if kind != "tar":
        flipped = bytearray(compress(whole) + compress(whole))
        flipped[len(compress(whole)) + 2] ^= 0xFF
        damaged["a second stream that does not begin"] = bytes(flipped)
        damaged["a flipped checksum"] = compress(whole)[:-5] + bytes([compress(whole)[-5] ^ 1]) + compress(whole)[-4:]
    for name, content in damaged.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UserError, match="damaged one"):
            assert read(tmp_path / "x") < 0, name


def test_no_flipped_byte_of_a_compressed_tar_costs_images(tmp_path: Path) -> None:
    whole = tar_bytes(pictures(8))
    for kind in ("gz", "bz2", "xz"):
        content = COMPRESSIONS[kind](whole)
        for place in range(0, len(content), max(1, len(content) // 150)):
            (tmp_path / "x").write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
            with contextlib.suppress(UserError):
                assert read(tmp_path / "x") == 8, (kind, place)


def test_damage_is_found_before_any_image_is_read(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes(pictures()))
    whole[len(whole.rstrip(b"\0")) // 512 * 512 - 1536 + 150] ^= 1
    for kind, compress in COMPRESSIONS.items():
        (tmp_path / kind).write_bytes(compress(bytes(whole[:-10_000])))
        with pytest.raises(UserError, match="damaged one"):
            SOURCES["image_folder"](tmp_path / kind)


def zip_bytes(files: dict[str, bytes | None], kind: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content or b"")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_whose_directory_and_members_disagree_is_named(tmp_path: Path, kind: int) -> None:
    files = pictures()
    whole = zip_bytes(files, kind)
    path = tmp_path / "x.zip"
    path.write_bytes(whole)
    assert read(path) == 40
    end = whole.rfind(b"PK\x05\x06")
    count, length, start = struct.unpack("<2xH2I", whole[end + 8 : end + 20])
    first = whole.find(b"PK\x01\x02", start + 4)
    last = whole.rfind(b"PK\x01\x02", 0, end)

    def ending(number: int, directory: bytes) -> bytes:
        return b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, number, number, len(directory), start, 0)

    def cut(begin: int, stop: int, number: int = count - 1) -> bytes:
        directory = whole[start:begin] + whole[stop:end]
        return whole[:start] + directory + ending(number, directory)

    damaged = {
        "garbage after": whole + b"garbage",
        "zeros after": whole + bytes(100),
        "garbage before": b"PK\x03\x04" + bytes(60) + whole,
        "two": whole + zip_bytes({"a.png": png()}, kind),
        "count": whole[: end + 8] + struct.pack("<2H", count + 1, count + 1) + whole[end + 12 :],
        "first not listed": cut(start, first),
        "last not listed": cut(last, end),
        "last not listed, but counted": cut(last, end, count),
        "cut": whole[:start],
        "local header": whole[:2] + b"\0" + whole[3:],
    }
    # The first is so short that only its header gives it away.
    assert length == end - start
    for name, content in damaged.items():
        path.write_bytes(content)
        assert fails(path), name


def test_ordinary_zips_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zip_bytes(pictures()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment PK"
        with archive.open("streamed.png", "w", force_zip64=True) as file:
            file.write(png())
        member = zipfile.ZipInfo("extra.png")
        member.extra = struct.pack("<HH", 0xCAFE, 60) + bytes(60)
        archive.writestr(member, png())
        archive.writestr("später.png", png())
    assert read(path) == 43

    class Pipe(io.RawIOBase):
        """Cannot seek: zipfile writes lengths behind the data."""

        def __init__(self) -> None:
            self.content = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.content += bytes(data)  # type: ignore[call-overload]
            return len(bytes(data))  # type: ignore[call-overload]

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, content in pictures().items():
            archive.writestr(name, content or b"")
    path.write_bytes(pipe.content)
    assert read(path) == 40


def test_damage_within_zips_never_costs_images_silently(tmp_path: Path) -> None:
    files = pictures(3)
    whole = zip_bytes({**files, "notes.txt": b"text"})
    path = tmp_path / "x.zip"
    silent: Counter[int] = Counter()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = tally(path)
            number = read(path)
        except (UserError, UnreadableImageError):
            continue
        # Fewer images only with a reason that stands in the report.
        assert sum(len(names) for names in found.values()) == 4, place
        silent[number] += 1
    assert silent[3] > 0
    assert sum(count for number, count in silent.items() if number < 3) <= 12


def test_memory_of_names_is_bounded_for_masks_of_a_tar(tmp_path: Path) -> None:
    files = {f"{i:05d}{suffix}": b"x" for i in range(500) for suffix in (".jpg", "_mask.png")}
    found = tally(make_tar(tmp_path / "x.tar", dict(files)))
    assert {reason: len(names) for reason, names in found.items()} == {"read": 500, "mask": 500}


def test_the_order_of_ordinary_folders_is_as_before(tmp_path: Path) -> None:
    names = ["b/z.png", "b/A.png", "a.png", "B.png", "a/b/c.png", "a/d.png", "a-b/e.png"]
    unpacked(tmp_path, {name: png() for name in names})
    expected = ["B.png", "a.png", "a/d.png", "a/b/c.png", "a-b/e.png", "b/A.png", "b/z.png"]
    assert [name for name, _ in image_files(tmp_path)] == expected
    assert np.unique([member.left_out for member in members(tmp_path)]).tolist() == [""]
