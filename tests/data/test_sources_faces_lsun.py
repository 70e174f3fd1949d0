"""CelebA, FFHQ and LSUN are read as their owners distribute them, and what is wrong with them is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from dvdp.config import DatasetParams
from dvdp.data.prepare import prepare
from dvdp.data.records import Form, encode
from dvdp.data.sources import SOURCES, UnreadableImageError
from dvdp.data.sources.celeba import CelebA
from dvdp.data.sources.ffhq import Ffhq
from dvdp.data.sources.lsun import Lsun
from dvdp.data.writer import StoreWriter
from dvdp.errors import UserError
from tests.data.support import encoded, encrypt, make_tar, make_zip, png


def unpacked(root: Path, files: Mapping[str, bytes | None]) -> Path:
    for name, content in files.items():
        if content is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    return root


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    assert str(error.value).startswith("dataset.path: ")
    assert "\n" not in str(error.value)
    return str(error.value)


# CelebA


def coordinates(width: int, height: int) -> Image.Image:
    """Red is x, green is y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


#: Order and folder as in the zip of its owners. PNG in disguise, so that pixels are exact.
CELEBA = {
    "img_align_celeba": None,
    "img_align_celeba/000003.jpg": encoded(coordinates(178, 218)),
    "img_align_celeba/000001.jpg": encoded(coordinates(178, 218)),
    "img_align_celeba/000002.jpg": encoded(coordinates(178, 218)),
}


def celeba_fails(path: Path, count: int = 3) -> str:
    with pytest.raises(UserError) as error:
        CelebA(path, count)
    return one_sentence(error)


def test_celeba_is_the_middle_148_pixels_of_its_zip_tar_or_folder(tmp_path: Path) -> None:
    names = ["img_align_celeba/000003.jpg", "img_align_celeba/000001.jpg", "img_align_celeba/000002.jpg"]
    folder = unpacked(tmp_path / "celeba", CELEBA)
    for path, expected in (
        (make_zip(tmp_path / "img_align_celeba.zip", CELEBA), names),
        (make_tar(tmp_path / "img_align_celeba.tar", CELEBA), names),
        (folder, sorted(names)),
        (folder / "img_align_celeba", ["000001.jpg", "000002.jpg", "000003.jpg"]),
    ):
        source = CelebA(path, count=3)
        assert (source.count, source.labels) == (3, ())
        assert [(item.name, item.label) for item in source] == [(name, None) for name in expected]
        for item in source:
            image = item.load()
            assert image.shape == (148, 148, 3)
            assert (image[0, 0, 0], image[-1, -1, 0]) == (15, 162), "x, 15 of 178 left out on both resolutions"
            assert (image[0, 0, 1], image[-1, -1, 1]) == (35, 182), "y, 35 of 218 left out on both resolutions"


def test_celeba_of_jpegs_becomes_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    face = encoded(Image.new("RGB", (178, 218), (200, 100, 50)), "JPEG")
    path = make_zip(tmp_path / "img_align_celeba.zip", {f"img_align_celeba/{i:06d}.jpg": face for i in range(1, 5)})
    monkeypatch.setattr(CelebA.__init__, "__defaults__", (4,))
    store = prepare(DatasetParams(name="celeba", source="celeba", path=path, resolution=16), tmp_path / "store")
    assert (store.count, store.source, store.labels) == (4, "celeba", ())


def test_faces_of_another_size_are_unreadable(tmp_path: Path) -> None:
    sizes = [(178, 218), (218, 178), (178, 219), (64, 64)]
    files = {f"{i}.jpg": encoded(Image.new("RGB", size), "JPEG") for i, size in enumerate(sizes)}
    first, *others = CelebA(unpacked(tmp_path, files), count=4)
    assert first.load().shape == (148, 148, 3)
    for item, (width, height) in zip(others, sizes[1:], strict=True):
        with pytest.raises(UnreadableImageError, match=f"{width}x{height} px, expected 178x218"):
            item.load()


def test_wrong_counts_of_celeba_are_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", CELEBA)
    with pytest.raises(UserError) as error:
        SOURCES["celeba"](path)
    assert f"found 3 images in '{path}', expected the 202,599 of img_align_celeba" in one_sentence(error)
    assert "found 3 images" in celeba_fails(path, count=2)
    (tmp_path / "empty").mkdir()
    assert "found 0 images" in celeba_fails(tmp_path / "empty")
    assert "found nothing at" in celeba_fails(tmp_path / "nowhere")


def test_members_outside_of_celebas_folder_do_not_count(tmp_path: Path) -> None:
    outside = {"../000004.jpg": png(), "/img_align_celeba/000005.jpg": png(), "__MACOSX/._000001.jpg": b"fork"}
    assert CelebA(make_zip(tmp_path / "x.zip", {**CELEBA, **outside}), count=3).count == 3


def test_a_damaged_or_encrypted_zip_of_celeba_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", CELEBA)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "damaged" in celeba_fails(path)
    path.write_bytes(whole)
    encrypt(path)
    assert "is encrypted" in celeba_fails(path)


# FFHQ

FFHQ = {
    "images1024x1024/LICENSE.txt": b"text",
    "images1024x1024/00000/00000.png": png(0, (128, 128)),
    "images1024x1024/00000/00001.png": png(1, (128, 128)),
    "images1024x1024/01000/01000.png": png(2, (128, 128)),
}


def test_the_thousands_of_ffhq_are_no_classes(tmp_path: Path) -> None:
    folder = unpacked(tmp_path / "ffhq", FFHQ)
    inside = ["00000/00000.png", "00000/00001.png", "01000/01000.png"]
    for path, above in (
        (folder, "images1024x1024/"),
        (folder / "images1024x1024", ""),
        (make_zip(tmp_path / "x.zip", FFHQ), "images1024x1024/"),
        (make_tar(tmp_path / "x.tar", FFHQ) / "images1024x1024", ""),
    ):
        source = Ffhq(path, count=3)
        assert (source.count, source.labels) == (3, ())
        assert [(item.name, item.label) for item in source] == [(above + name, None) for name in inside]
        assert [int(item.load()[0, 0, 0]) for item in source] == [0, 1, 2]


def test_faces_of_ffhq_are_of_its_two_sizes_and_photographs_in_the_wild_are_not(tmp_path: Path) -> None:
    sizes = {"0.png": (1024, 1024), "1.png": (128, 128), "2.png": (1024, 768)}
    source = Ffhq(unpacked(tmp_path, {k: png(0, v) for k, v in sizes.items()}), count=3)
    large, small, wild = source
    assert large.load().shape == (1024, 1024, 3)
    assert small.load().shape == (128, 128, 3)
    with pytest.raises(UnreadableImageError, match="1024x768 px, expected 1024x1024 or 128x128"):
        wild.load()


def test_wrong_counts_of_ffhq_are_named(tmp_path: Path) -> None:
    thumbnails = {name.replace("images1024x1024", "thumbnails128x128"): content for name, content in FFHQ.items()}
    both = unpacked(tmp_path / "ffhq-dataset", {**FFHQ, **thumbnails})
    with pytest.raises(UserError) as error:
        SOURCES["ffhq"](both)
    assert "found 6 images" in one_sentence(error)
    assert "expected the 70,000 of images1024x1024 or thumbnails128x128; give these alone" in one_sentence(error)
    assert Ffhq(both / "thumbnails128x128", count=3).count == 3


# LSUN


def make_lmdb(path: Path, records: Mapping[bytes, bytes]) -> Path:
    """As LSUN's own program writes it, but for the size of its map."""
    with lmdb.open(str(path), map_size=8 << 20) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    return path


def webp(value: int) -> bytes:
    return encoded(Image.new("RGB", (20, 16), (value, value, value)), "WEBP", lossless=True)


#: Forty hexadecimal digits, put in out of order.
KEYS = [b"%040x" % (i * 7919 % 101 * 10**40) for i in range(100)]
LSUN = {key: webp(i) if i % 2 else encoded(Image.new("L", (20, 16), i), "JPEG") for i, key in enumerate(KEYS)}


def lsun_fails(path: Path) -> str:
    with pytest.raises(UserError) as error:
        Lsun(path)
    return one_sentence(error)


def test_lsun_is_streamed_in_the_order_of_its_keys_and_stays_as_it_is(tmp_path: Path) -> None:
    path = make_lmdb(tmp_path / "bedroom_train_lmdb", LSUN)
    (path / "lock.mdb").unlink()
    before = (path / "data.mdb").read_bytes()
    path.chmod(0o555)
    source = Lsun(path)
    assert (source.count, source.labels) == (100, ())
    order = sorted(KEYS)
    for _ in range(2):
        assert [item.name for item in source] == [key.decode() for key in order]
    assert [int(item.load()[0, 0, 0]) for item in source] == pytest.approx([KEYS.index(key) for key in order], abs=2)
    path.chmod(0o755)
    assert [file.name for file in path.iterdir()] == ["data.mdb"]
    assert (path / "data.mdb").read_bytes() == before


def test_an_item_of_lsun_that_is_read_too_late_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    items = list(Lsun(make_lmdb(tmp_path / "x", LSUN)))
    with pytest.raises(UserError):
        items[0].load()


def test_a_damaged_record_of_lsun_is_unreadable_alone(tmp_path: Path) -> None:
    records = {**LSUN, KEYS[0]: b"", KEYS[5]: LSUN[KEYS[5]][:20]}
    unreadable = []
    for item in Lsun(make_lmdb(tmp_path / "x", records)):
        try:
            item.load()
        except UnreadableImageError:
            unreadable.append(item.name.encode())
    assert unreadable == sorted([KEYS[0], KEYS[5]])


def test_lsun_becomes_a_store(tmp_path: Path) -> None:
    path = make_lmdb(tmp_path / "church_outdoor_train_lmdb", LSUN)
    store = prepare(DatasetParams(name="church", source="lsun", path=path, resolution=16), tmp_path / "store")
    assert (store.count, store.source, store.labels) == (100, "lsun", ())


def test_what_is_no_lmdb_of_lsun_is_named(tmp_path: Path) -> None:
    assert "found no data.mdb in" in lsun_fails(tmp_path / "nowhere")
    zipped = make_zip(tmp_path / "bedroom_train_lmdb.zip", {"bedroom_train_lmdb/data.mdb": b"x"})
    assert "unpack it and give the folder" in lsun_fails(zipped)
    assert "found no data.mdb in" in lsun_fails(unpacked(tmp_path / "folder", {"a.png": png()}))
    assert "found 0 records" in lsun_fails(make_lmdb(tmp_path / "empty", {}))
    foreign = make_lmdb(tmp_path / "foreign", {b"%d" % i: b"some text" for i in range(20)})
    assert "found 20 records" in lsun_fails(foreign)
    with StoreWriter(tmp_path / "ours", name="ours", source="digits", form=Form(8)) as writer:
        writer.add(encode([np.zeros((3, 8, 8), np.uint8)] * 20, [-1] * 20, Form(8)))
        writer.finish()
    assert "found no data.mdb in" in lsun_fails(tmp_path / "ours")
    (tmp_path / "ours" / "data-00000.mdb").rename(tmp_path / "ours" / "data.mdb")
    assert "no image files among the first" in lsun_fails(tmp_path / "ours")


@pytest.mark.parametrize("content", [b"", b"short", bytes(100_000), b"text " * 20_000])
def test_a_data_file_that_is_no_lmdb_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    assert "no LMDB file" in lsun_fails(tmp_path)


def test_an_lmdb_of_lsun_that_was_copied_in_part_is_named(tmp_path: Path) -> None:
    path = make_lmdb(tmp_path / "x", LSUN)
    whole = (path / "data.mdb").stat().st_size
    os.truncate(path / "data.mdb", whole - 4096)
    assert f"is cut short, found {whole - 4096:,} bytes, expected" in lsun_fails(path)
    for size in (8192, 6000, 4096, 1000):
        os.truncate(path / "data.mdb", size)
        assert "cut short" in lsun_fails(path) or "no LMDB file" in lsun_fails(path)
