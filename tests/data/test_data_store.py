"""The LMDB: what goes in comes out, whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dvdp import bands
from dvdp.data.store import FORMAT_VERSION, Encoding, ImageStore, StoreMetadata, StoreWriter
from dvdp.errors import UserError


def some_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth random images, (count, 3, side, side)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, side // 4, side // 4), dtype=np.uint8)
    fine = np.random.default_rng(seed + 1).integers(-20, 20, (count, 3, side, side))
    return (coarse.repeat(4, axis=2).repeat(4, axis=3) + fine).clip(0, 255).astype(np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(
    path: Path, images: np.ndarray, encoding: Encoding = "raw", labels: tuple[str, ...] = ("a", "b", "c")
) -> StoreMetadata:
    with StoreWriter(
        path, name="some", source="image_folder", resolution=images.shape[-1], encoding=encoding, labels=labels
    ) as writer:
        for i, image in enumerate(images):
            writer.add(image, i % 4 - 1)
        return writer.finish(skipped=2)


def fails(path: Path) -> str:
    with pytest.raises(UserError) as error:
        ImageStore(path)
    text = str(error.value)
    assert str(path) in text
    assert "dvdp prepare" in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize(("count", "side"), [(1, 4), (700, 32), (60, 256)])
def test_images_and_labels_come_back(tmp_path: Path, encoding: Encoding, count: int, side: int) -> None:
    images = some_images(count, side)
    metadata = write(tmp_path / "store", images, encoding)
    store = ImageStore(tmp_path / "store")
    assert store.metadata == metadata
    assert len(store) == metadata.count == count
    assert (metadata.resolution, metadata.channels, metadata.encoding) == (side, 3, encoding)
    assert (metadata.name, metadata.source) == ("some", "image_folder")
    assert (metadata.labels, metadata.skipped, metadata.version) == (("a", "b", "c"), 2, FORMAT_VERSION)
    for i in {0, count // 2, count - 1}:
        image, label = store[i]
        np.testing.assert_array_equal(image, images[i])
        assert image.dtype == np.uint8
        assert label == i % 4 - 1
    some = [count - 1, 0, count // 2]
    np.testing.assert_array_equal(store.images(some), images[some])
    assert names(tmp_path / "store") == ["data.mdb"]
    assert names(tmp_path) == ["store"]


def test_an_index_out_of_range_is_an_index_error(tmp_path: Path) -> None:
    write(tmp_path / "store", some_images(3, 8))
    store = ImageStore(tmp_path / "store")
    assert len(list(store)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            store[index]


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_rebuild_is_byte_identical(tmp_path: Path, encoding: Encoding) -> None:
    images = some_images(1000, 32)  # Grows the map several times.
    write(tmp_path / "one" / "store", images, encoding)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write(tmp_path / "two" / "store", images, encoding)
    finally:
        torch.set_num_threads(threads)
    one, two = ((tmp_path / name / "store" / "data.mdb").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_digest_is_of_pixels_and_labels_in_order(tmp_path: Path) -> None:
    images = some_images(8, 16)
    digest = write(tmp_path / "raw", images).digest
    assert write(tmp_path / "png", images, "png").digest == digest
    assert write(tmp_path / "renamed", images, labels=("x", "y", "z")).digest == digest
    assert write(tmp_path / "order", images[::-1]).digest != digest
    with StoreWriter(tmp_path / "labels", name="some", source="digits", resolution=16) as writer:
        for image in images:
            writer.add(image)
        assert writer.finish().digest != digest


@pytest.mark.parametrize(("side", "halvings"), [(4, 2), (12, 2), (32, 4), (64, 4), (9, 0)])
def test_band_deviations_are_those_of_the_bands(tmp_path: Path, side: int, halvings: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 3, side, side), dtype=np.uint8)
    metadata = write(tmp_path / "store", images)
    x = torch.from_numpy(images).double() / 127.5 - 1
    assert len(metadata.detail_deviations) == halvings
    assert len(metadata.level_deviations) == halvings + 1
    for levels in range(halvings + 1):
        # Straight from the definition: take the mean image away, then look at each band.
        expected = bands.energies(x - x.mean(dim=0), levels).mean(dim=0).sqrt()
        torch.testing.assert_close(
            torch.tensor(metadata.band_deviations(levels), dtype=torch.float64), expected, rtol=0, atol=1e-6
        )
    with pytest.raises(UserError, match="at most"):
        metadata.band_deviations(halvings + 1)


def test_equal_images_deviate_by_nothing(tmp_path: Path) -> None:
    metadata = write(tmp_path / "store", some_images(1, 16).repeat(5, axis=0))
    assert metadata.band_deviations(2) == (0.0, 0.0, 0.0)


def test_an_existing_store_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write(path, some_images(5, 16))
    before = ImageStore(path)
    write(path, some_images(7, 16, seed=5))
    assert len(ImageStore(path)) == 7
    np.testing.assert_array_equal(before[0][0], some_images(5, 16)[0])
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no store"):
        write(path, some_images(5, 16))
    assert (path / "thesis.txt").exists()


def test_nothing_is_there_before_the_end_and_an_error_leaves_nothing(tmp_path: Path) -> None:
    path, images = tmp_path / "store", some_images(3000, 32)

    def fail_in_the_middle() -> None:
        with StoreWriter(path, name="some", source="digits", resolution=32) as writer:
            for image in images:
                writer.add(image)
            assert not path.exists()
            assert len(names(tmp_path)) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_in_the_middle()
    assert names(tmp_path) == []


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    assert "no store" in fails(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no store" in fails(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "no store" in fails(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"junk", bytes(20_000), np.random.default_rng(0).bytes(20_000)])
def test_a_file_that_is_no_lmdb_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data.mdb").write_bytes(content)
    assert "no LMDB" in fails(tmp_path / "store")


def test_a_store_that_is_cut_short_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store", some_images(500, 32))
    file = tmp_path / "store" / "data.mdb"
    os.truncate(file, file.stat().st_size // 2)
    assert "cut short" in fails(tmp_path / "store")


def test_a_foreign_lmdb_is_named(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "store"), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"00000000", b"somebody's")
    assert "half-written or another program's" in fails(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"version": 99}, "format 99"), ({"version": None}, "format"), ({"more": 1}, "format"), ({"count": 9}, "holds 5")],
)
def test_metadata_of_another_kind_is_named(tmp_path: Path, change: dict[str, int | None], says: str) -> None:
    write(tmp_path / "store", some_images(5, 16))
    with lmdb.open(str(tmp_path / "store"), lock=False) as environment, environment.begin(write=True) as transaction:
        tree = json.loads(transaction.get(b"metadata"))
        transaction.put(b"metadata", json.dumps({**tree, **change}).encode())
    assert says in fails(tmp_path / "store")


def test_metadata_that_is_no_json_is_named(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "store"), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"metadata", b"\xff\xfe")
    assert "format unknown" in fails(tmp_path / "store")


def test_two_stores_of_one_file_may_be_open_at_once(tmp_path: Path) -> None:
    write(tmp_path / "store", some_images(5, 16))
    (tmp_path / "link").symlink_to(tmp_path / "store")
    one, two, three = ImageStore(tmp_path / "store"), ImageStore(tmp_path / "store"), ImageStore(tmp_path / "link")
    np.testing.assert_array_equal(one[4][0], two[4][0])
    np.testing.assert_array_equal(one[4][0], three[4][0])


def test_a_store_is_pickled_without_its_handle(tmp_path: Path) -> None:
    images = some_images(5, 16)
    write(tmp_path / "store", images)
    store = ImageStore(tmp_path / "store")
    assert len(pickle.dumps(store)) < 2000
    copy = pickle.loads(pickle.dumps(store))
    assert copy.metadata == store.metadata
    np.testing.assert_array_equal(copy[3][0], images[3])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_a_store_that_their_parent_has_open(tmp_path: Path, method: str) -> None:
    images = some_images(40, 16)
    write(tmp_path / "store", images)
    store = ImageStore(tmp_path / "store")
    store[0]
    loader = DataLoader(
        store,
        batch_size=8,
        num_workers=2 if method == "fork" else 1,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    for _ in range(1 if method == "spawn" else 2):
        read = torch.cat([batch for batch, _ in loader])
        np.testing.assert_array_equal(read.numpy(), images)
    np.testing.assert_array_equal(store[1][0], images[1])
