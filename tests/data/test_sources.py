"""Every source streams its images in a fixed order, with labels, and names what is wrong."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvdp.data.sources import CIFAR10_LABELS, SOURCES, Cifar10, Source, UnreadableImageError, decode
from dvdp.errors import UserError
from tests.data.support import add_link, encoded, encrypt, make_tar, make_tree, make_zip, png

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder(path: Path) -> Source:
    return SOURCES["image_folder"](path)


def names_and_labels(source: Source) -> list[tuple[str, str | None]]:
    return [(item.name, item.label) for item in source]


def load_all(source: Source) -> None:
    for item in source:
        item.load()


def fails(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_all(folder(path))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("dataset.path: ")
    return str(error.value)


# Digits


def test_digits_are_their_scans_in_grey() -> None:
    source = SOURCES["digits"](None)
    items = list(source)
    assert len(items) == source.count == 1797
    assert source.labels == tuple("0123456789")
    assert [item.label for item in items[:12]] == list("012345678901")
    image = items[0].load()
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    assert (image[:, :, 0] == image[:, :, 2]).all()
    assert max(item.load().max() for item in items[:20]) == 255


# Folders


def test_a_tree_of_classes_is_read_in_order(tmp_path: Path) -> None:
    make_tree(tmp_path, ["dog/b.png", "cat/z.png", "dog/a.JPG", "cat/10.jpeg", "cat/9.webp"])
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / "._a.png").write_bytes(b"a resource fork")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_bytes(png())
    source = folder(tmp_path)
    assert source.count == 5
    assert source.labels == ("cat", "dog")
    assert names_and_labels(source) == [
        ("cat/10.jpeg", "cat"),
        ("cat/9.webp", "cat"),
        ("cat/z.png", "cat"),
        ("dog/a.JPG", "dog"),
        ("dog/b.png", "dog"),
    ]
    assert names_and_labels(source) == names_and_labels(folder(tmp_path))
    assert [int(item.load()[0, 0, 0]) for item in source] == [3, 4, 1, 2, 0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b.png"], [None, None]),
        (["only/a.png", "only/b.png"], [None, None]),
        (["x/y/a.png", "x/y/b.png"], [None, None]),
        (["only/cat/a.png", "only/dog/b.png"], ["cat", "dog"]),
        (["test/cat/a.png", "train/cat/b.png", "train/dog/c.png"], ["cat", "cat", "dog"]),
        (["set/test/cat/a.png", "set/train/dog/b.png"], ["cat", "dog"]),
        (["a.png", "cat/b.png"], [None, "cat"]),
    ],
)
def test_a_label_is_the_folder_that_holds_the_image(
    tmp_path: Path, names: list[str], expected: list[str | None]
) -> None:
    tree = folder(make_tree(tmp_path / "tree", names))
    assert [item.label for item in tree] == expected
    assert tree.labels == tuple(sorted({label for label in expected if label}))
    files = {name: png() for name in names}
    for archive in (folder(make_tar(tmp_path / "x.tar", files)), folder(make_zip(tmp_path / "x.zip", files))):
        assert [item.label for item in archive] == expected
        assert archive.labels == tree.labels


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make_tree(tmp_path / "elsewhere", ["a.png"])
    make_tree(tmp_path / "tree", ["dog/b.png"])
    (tmp_path / "tree" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "dog" / "up").symlink_to(tmp_path / "tree")
    assert names_and_labels(folder(tmp_path / "tree")) == [("cat/a.png", "cat"), ("dog/b.png", "dog")]


def test_a_broken_link_is_unreadable_and_a_pipe_is_no_image(tmp_path: Path) -> None:
    make_tree(tmp_path, ["a.png"])
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "c.png")
    items = list(folder(tmp_path))
    assert [item.name for item in items] == ["a.png", "b.png"]
    with pytest.raises(UnreadableImageError, match="No such file"):
        items[1].load()


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    assert "found nothing at" in fails(tmp_path / "nowhere" / "below")
    assert "no images" in fails(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    assert "no images" in fails(tmp_path)
    assert "no tar" in fails(tmp_path / "notes.txt")


# Tars


@pytest.mark.parametrize(
    ("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz"), ("tar.bz2", "w:bz2")]
)
def test_a_tar_is_streamed_in_its_own_order(tmp_path: Path, suffix: str, mode: str) -> None:
    files = {"set": None, "set/dog/b.png": png(7), "set/cat": None, "set/cat/a.png": png(8), "set/dog/a.png": png(9)}
    source = folder(make_tar(tmp_path / f"x.{suffix}", files, mode))
    assert source.count == 3
    assert source.labels == ("cat", "dog")
    assert names_and_labels(source) == [("set/dog/b.png", "dog"), ("set/cat/a.png", "cat"), ("set/dog/a.png", "dog")]
    assert [int(item.load()[0, 0, 0]) for item in source] == [7, 8, 9]
    assert names(tmp_path) == [f"x.{suffix}"]


def test_members_that_are_no_files_or_point_outside_are_left_out(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "x.tar",
        {
            "./cat/a.png": png(),
            "../evil.png": png(),
            "cat/../../evil.png": png(),
            "/etc/evil.png": png(),
            "cat/._a.png": b"a resource fork",
            "cat/folder.png": None,
            "README.md": b"hello",
        },
    )
    with tarfile.open(path, "a") as archive:
        for name, kind in (
            ("dog/link.png", tarfile.SYMTYPE),
            ("dog/hard.png", tarfile.LNKTYPE),
            ("p.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert names_and_labels(folder(path)) == [("cat/a.png", None)]


def test_a_path_may_go_on_inside_a_tar(tmp_path: Path) -> None:
    files = {"set/test/cat/a.png": png(), "set/train/cat/b.png": png(), "set/train/dog/c.png": png()}
    path = make_tar(tmp_path / "x.tar.gz", files, "w:gz")
    source = folder(path / "set" / "train")
    assert names_and_labels(source) == [("cat/b.png", "cat"), ("dog/c.png", "dog")]
    assert "no images" in fails(path / "set" / "valid")


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
def test_a_tar_that_is_cut_short_is_named(tmp_path: Path, suffix: str, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = make_tar(tmp_path / f"x.{suffix}", {f"{i}.png": encoded(Image.fromarray(noise)) for i in range(5)}, mode)
    os.truncate(path, path.stat().st_size // 2)
    assert "damaged" in fails(path)


def test_damage_to_the_data_of_a_compressed_tar_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    files = {f"{i}.png": encoded(Image.fromarray(noise)) for i in range(5)}
    path = make_tar(tmp_path / "x.tar.gz", files, "w:gz")
    source = folder(path)
    os.truncate(path, path.stat().st_size // 2)  # After the names have been looked through.
    with pytest.raises(UserError, match="damaged"):
        load_all(source)


@pytest.mark.parametrize("content", [b"", b"not a tar at all", b"PK\x03\x04" + bytes(600), b"\x1f\x8b" + bytes(50)])
def test_a_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "no tar" in fails(tmp_path / "x.tar")


def test_memory_does_not_grow_with_the_members_of_a_tar(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {f"{i:06d}.png": png() for i in range(3000)})
    tracemalloc.start()
    try:
        stream = iter(folder(path))
        list(islice((item.load() for item in stream), 500))
        before = tracemalloc.get_traced_memory()[0]
        assert sum(item.load().shape == (4, 5, 3) for item in stream) == 2500
        assert tracemalloc.get_traced_memory()[0] - before < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.skipif("DVDP_TEST_DATA" not in os.environ, reason="DVDP_TEST_DATA names no folder of test data")
def test_the_first_images_of_a_real_tar_are_photographs() -> None:
    path = Path(os.environ["DVDP_TEST_DATA"]) / "flowers256-part1.tar"
    source = folder(path)
    assert source.count == 2771
    for item in islice(source, 50):
        image = item.load()
        assert image.shape == (256, 256, 3)
        assert image.std() > 10
        assert item.label in source.labels
        assert item.name.startswith(f"flowers256/{item.label}/image_")


# Zips


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_is_streamed_in_its_own_order(tmp_path: Path, kind: int) -> None:
    files = {"set": None, "set/dog/b.png": png(7), "set/cat": None, "set/cat/a.png": png(8), "set/dog/a.png": png(9)}
    source = folder(make_zip(tmp_path / "x.zip", files, kind))
    assert source.count == 3
    assert source.labels == ("cat", "dog")
    assert names_and_labels(source) == [("set/dog/b.png", "dog"), ("set/cat/a.png", "cat"), ("set/dog/a.png", "dog")]
    assert [int(item.load()[0, 0, 0]) for item in source] == [7, 8, 9]
    assert names(tmp_path) == ["x.zip"]


def test_members_of_a_zip_that_are_links_or_hidden_or_point_outside_are_left_out(tmp_path: Path) -> None:
    outside = {"../evil.png": png(), "cat/../../evil.png": png(), "/etc/evil.png": png()}
    hidden = {"__MACOSX/cat/._a.png": b"a resource fork", ".cache/x.png": png()}
    others = {"cat/folder.png": None, "README.md": b"hello"}
    path = make_zip(tmp_path / "x.zip", {"./cat/a.png": png(), **outside, **hidden, **others})
    add_link(path, "dog/link.png", "/etc/passwd")
    assert names_and_labels(folder(path)) == [("cat/a.png", None)]
    assert "no images" in fails(make_zip(tmp_path / "outside.zip", outside))


def test_a_path_may_go_on_inside_a_zip(tmp_path: Path) -> None:
    files = {"set/test/cat/a.png": png(), "set/train/cat/b.png": png(), "set/train/dog/c.png": png()}
    path = make_zip(tmp_path / "x.zip", files)
    assert names_and_labels(folder(path / "set" / "train")) == [("cat/b.png", "cat"), ("dog/c.png", "dog")]
    assert "no images" in fails(path / "set" / "valid")


def test_a_zip_that_is_cut_short_empty_or_encrypted_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {f"{i}.png": encoded(NOISE) for i in range(5)})
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        assert "damaged" in fails(path)
    assert "no images" in fails(make_zip(tmp_path / "empty.zip", {}))
    path.write_bytes(whole)
    encrypt(path)
    assert "is encrypted ('0.png'), expected an archive without a password" in fails(path)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_to_any_part_of_a_zip_is_named(tmp_path: Path, kind: int) -> None:
    path = make_zip(tmp_path / "x.zip", {"a/x.png": png(1)}, kind)
    whole = path.read_bytes()
    told = []
    for place in range(4, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            load_all(folder(path))
        except UserError as error:
            told.append(str(error))
        except UnreadableImageError:
            pass
    assert len(told) > len(whole) / 3
    assert all(text.startswith("dataset.path: ") and "\n" not in text for text in told)


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "x.zip", {"inner.png": png()})
    path = make_tar(tmp_path / "x.tar", {"outer.png": png(), "x.zip": inner.read_bytes()})
    assert names_and_labels(folder(path)) == [("outer.png", None)]


# What image files hold


def test_all_kinds_of_pixels_become_rgb() -> None:
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    grey = np.repeat(ramp[:, :, None], 3, axis=2)
    alpha = np.full((8, 8), 255, np.uint8)
    kinds = {
        "grey": encoded(Image.fromarray(ramp)),
        "grey JPEG": encoded(Image.fromarray(ramp), "JPEG", quality=100),
        "16 bit": encoded(Image.fromarray(ramp.astype(np.uint16) * 257)),
        "16 bit TIFF": encoded(Image.fromarray(ramp.astype(np.uint16) * 257), "TIFF"),
        "16 bit in 32": encoded(Image.fromarray(ramp.astype(np.int32) * 257), "TIFF"),
        "grey and alpha": encoded(Image.fromarray(np.stack([ramp, alpha], axis=2))),
        "RGBA": encoded(Image.fromarray(np.dstack([grey, alpha]))),
        "palette": encoded(Image.fromarray(grey).quantize(256)),
        "CMYK": encoded(Image.fromarray(grey).convert("CMYK"), "JPEG", quality=100),
        "YCbCr": encoded(Image.fromarray(grey).convert("YCbCr"), "JPEG", quality=100),
        "WebP": encoded(Image.fromarray(grey), "WEBP", lossless=True),
        "PGM": b"P5 8 8 255 " + ramp.tobytes(),
    }
    for name, content in kinds.items():
        image = decode(content)
        assert image.dtype == np.uint8, name
        assert image.shape == (8, 8, 3), name
        assert np.abs(image.astype(int) - grey).max() <= 3, name
    bits = decode(encoded(Image.fromarray(ramp > 128)))
    assert np.array_equal(bits, np.where(grey > 128, 255, 0))


def test_transparent_pixels_are_laid_over_white() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 128, 255]
    assert decode(encoded(Image.fromarray(pixels)))[0, :, 0].tolist() == [255, 127, 0]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(encoded(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_exif_turns_an_image_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by a quarter, clockwise.
    assert decode(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).shape == (8, 4, 3)


def test_a_single_pixel_and_an_animation_are_images() -> None:
    assert decode(png(9, size=(1, 1))).tolist() == [[[9, 0, 246]]]
    frames = [Image.new("L", (4, 4), value) for value in (50, 100)]
    assert (decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 50).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "known format"),
        (b"<html>404</html>", "known format"),
        (png()[:40], "known format"),
        (encoded(NOISE, "JPEG")[:900], "truncated"),
        (encoded(NOISE)[:900], "truncated"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"), "32-bit"),
    ],
    ids=["empty", "page", "header", "jpeg", "png", "float", "32-bit"],
)
def test_what_cannot_be_read_says_why_without_addresses(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason) as error:
        decode(content)
    assert "0x" not in str(error.value)
    assert "\n" not in str(error.value)


# CIFAR-10


@pytest.fixture(scope="module")
def cifar() -> dict[str, bytes]:
    """Files in the official format, ten images each; batch 2 stands first, as in the official archive's disorder."""
    random = np.random.default_rng(0)
    files = {}
    for name in ("data_batch_2.bin", "test_batch.bin", "data_batch_1.bin"):
        records = random.integers(0, 256, (10, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(10)
        files[name] = records.tobytes()
    return files


def cifar_archive(path: Path, files: Mapping[str, bytes]) -> tuple[Path, str]:
    inside = {"cifar-10-batches-bin": None, "cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    make_tar(path, {**inside, **{f"cifar-10-batches-bin/{k}": v for k, v in files.items()}}, "w:gz")
    return path, hashlib.md5(path.read_bytes()).hexdigest()


def test_the_training_split_of_cifar10_is_read_from_archive_and_folder(tmp_path: Path, cifar: dict[str, bytes]) -> None:
    path, md5 = cifar_archive(tmp_path / "cifar-10-binary.tar.gz", cifar)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name, content in cifar.items():
        (unpacked / name).write_bytes(content)
    expected = np.frombuffer(cifar["data_batch_1.bin"] + cifar["data_batch_2.bin"], np.uint8).reshape(20, 3073)
    archive = Cifar10(path, md5=md5)
    tree = SOURCES["cifar10"](unpacked)
    for source in (archive, tree):
        assert source.count == 20
        assert source.labels == CIFAR10_LABELS
        items = [(item.name, item.label, item.load()) for item in source]
        assert [label for _, label, _ in items] == [*CIFAR10_LABELS] * 2
        for record, (_, _, image) in zip(expected, items, strict=True):
            np.testing.assert_array_equal(image[:, :, 1], record[1 + 1024 : 1 + 2048].reshape(32, 32))
            assert image.shape == (32, 32, 3)
        assert items[11][0] == "data_batch_2.bin/00001"


def cifar_fails(path: Path | None, **options: str) -> str:
    with pytest.raises(UserError) as error:
        list(Cifar10(path, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_files_of_cifar10_are_named(tmp_path: Path, cifar: dict[str, bytes]) -> None:
    path, md5 = cifar_archive(tmp_path / "cifar-10-binary.tar.gz", cifar)
    assert f"has MD5 {md5}, expected c32a1d4ab5d03f1284b67883e8d87530" in cifar_fails(path)
    assert "found nothing at" in cifar_fails(tmp_path / "nowhere")
    assert "no data_batch_*.bin" in cifar_fails(tmp_path)
    (tmp_path / "text").write_text("text")
    assert "no tar" in cifar_fails(tmp_path / "text", md5=hashlib.md5(b"text").hexdigest())
    (tmp_path / "data_batch_1.bin").write_bytes(cifar["data_batch_1.bin"][:-1])
    assert "30,729 bytes, expected a multiple of 3,073" in cifar_fails(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x0b" + cifar["data_batch_1.bin"][1:])
    assert "class 11, expected 0 to 9" in cifar_fails(tmp_path)
    (tmp_path / "data_batch_2.bin").symlink_to("nowhere")
    assert "data_batch_2.bin' (No such file or directory), expected a file of CIFAR-10" in cifar_fails(tmp_path)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a real server of the folder ``served``."""
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_cifar10_is_downloaded_once_and_checked(
    tmp_path: Path, cifar: dict[str, bytes], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, md5 = cifar_archive(tmp_path / "served" / "cifar.tar.gz", cifar)
    url = f"{address}/cifar.tar.gz"
    assert "MD5" in cifar_fails(None, url=url)
    assert names(tmp_path / "cache" / "dvdp") == []
    assert Cifar10(None, url=url, md5=md5).count == 20
    path.unlink()
    assert Cifar10(None, url=url, md5=md5).count == 20
    assert "fetch that file by other means" in cifar_fails(None, url=f"{address}/other.tar.gz", md5=md5)
    assert names(tmp_path / "cache" / "dvdp") == ["cifar.tar.gz"]
