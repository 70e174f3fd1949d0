"""The LMDB: what goes in comes out, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dvdp.data.moments import Moments
from dvdp.data.records import Encoding, Form, Records, encode
from dvdp.data.store import FORMAT_VERSION, ImageStore, StoreMetadata
from dvdp.data.writer import StoreWriter
from dvdp.diffusion import bands
from dvdp.errors import UserError
from tests.data.support import contents, forked, names


def some_images(count: int, resolution: int, seed: int = 0) -> np.ndarray:
    """Smooth random images, (count, 3, side, side)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, resolution // 4, resolution // 4), dtype=np.uint8)
    fine = np.random.default_rng(seed + 1).integers(-20, 20, (count, 3, resolution, resolution))
    return (coarse.repeat(4, axis=2).repeat(4, axis=3) + fine).clip(0, 255).astype(np.uint8)


def form_of(images: np.ndarray, encoding: Encoding = "raw") -> Form:
    return Form(images.shape[-1], encoding, 80 if encoding == "jpeg" else None)


def chunks(images: np.ndarray, form: Form, size: int = 50) -> list[Records]:
    """Labelled -1, 0, 1, 2, -1, 0, .."""
    labels = [i % 4 - 1 for i in range(len(images))]
    return [encode(images[i : i + size], labels[i : i + size], form) for i in range(0, len(images), size)]


def write(
    path: Path,
    images: np.ndarray,
    encoding: Encoding = "raw",
    labels: tuple[str, ...] = ("a", "b", "c"),
    shard_bytes: int = 8 << 30,
) -> StoreMetadata:
    form = form_of(images, encoding)
    with StoreWriter(
        path, name="some", source="image_folder", form=form, labels=labels, shard_bytes=shard_bytes
    ) as writer:
        for records in chunks(images, form):
            writer.add(records)
            writer.checkpoint()
        writer.tally.skipped = 2
        return writer.finish()


def fails(path: Path) -> str:
    with pytest.raises(UserError) as error:
        ImageStore(path)
    text = str(error.value)
    assert str(path) in text
    assert "dvdp prepare" in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize(("count", "resolution"), [(1, 4), (700, 32), (60, 256)])
def test_images_and_labels_come_back(tmp_path: Path, encoding: Encoding, count: int, resolution: int) -> None:
    images = some_images(count, resolution)
    metadata = write(tmp_path / "store", images, encoding)
    store = ImageStore(tmp_path / "store")
    assert store.metadata == metadata
    assert len(store) == metadata.count == count
    assert (metadata.resolution, metadata.channels, metadata.encoding) == (resolution, 3, encoding)
    assert (metadata.name, metadata.source) == ("some", "image_folder")
    assert (metadata.labels, metadata.skipped, metadata.version) == (("a", "b", "c"), 2, FORMAT_VERSION)
    assert metadata.label_counts == tuple(len(range(label, count, 4)) for label in (1, 2, 3, 0))
    for i in {0, count // 2, count - 1}:
        image, label = store[i]
        np.testing.assert_array_equal(image, images[i])
        assert image.dtype == np.uint8
        assert label == i % 4 - 1
    some = [count - 1, 0, count // 2]
    np.testing.assert_array_equal(store.images(some), images[some])
    assert names(tmp_path / "store") == ["data-00000.mdb", "digests.bin", "metadata.json"]
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
    assert contents(tmp_path / "one" / "store") == contents(tmp_path / "two" / "store")


def test_the_digest_is_of_pixels_and_labels_in_order(tmp_path: Path) -> None:
    images = some_images(8, 16)
    digest = write(tmp_path / "raw", images).digest
    assert write(tmp_path / "png", images, "png").digest == digest
    assert write(tmp_path / "renamed", images, labels=("x", "y", "z")).digest == digest
    assert write(tmp_path / "order", images[::-1]).digest != digest
    with StoreWriter(tmp_path / "labels", name="some", source="digits", form=Form(16)) as writer:
        writer.add(encode(list(images), [-1] * 8, Form(16)))
        assert writer.finish().digest != digest
    # As docs/data.md has it: anybody can compute it.
    records = [
        hashlib.sha256(image.tobytes() + (i % 4 - 1).to_bytes(4, "little", signed=True)).digest()
        for i, image in enumerate(images)
    ]
    assert (tmp_path / "raw" / "digests.bin").read_bytes() == b"".join(records)
    assert hashlib.sha256(b"".join(records)).hexdigest() == digest


def test_jpeg_is_smaller_and_its_digest_and_std_are_of_what_readers_get(tmp_path: Path) -> None:
    images = some_images(60, 64)
    raw, jpeg = write(tmp_path / "raw", images), write(tmp_path / "jpeg", images, "jpeg")
    assert (jpeg.encoding, jpeg.jpeg_quality, raw.jpeg_quality) == ("jpeg", 80, None)
    assert jpeg.shard_bytes[0] < raw.shard_bytes[0] / 2
    store = ImageStore(tmp_path / "jpeg")
    read = store.images(range(60))
    assert 0 < np.abs(read.astype(int) - images).mean() < 15
    assert store[6][1] == 1
    assert write(tmp_path / "again", read).digest == jpeg.digest != raw.digest
    assert Moments.of(read, 64).std() == (jpeg.detail_std, jpeg.level_std)


def test_an_image_of_another_shape_is_an_error() -> None:
    for image in (np.zeros((3, 8, 9), np.uint8), np.zeros((3, 8, 8), np.float32)):
        with pytest.raises(ValueError, match="image: "):
            encode([image], [0], Form(8))


@pytest.mark.parametrize(("resolution", "halvings"), [(4, 2), (12, 2), (32, 4), (64, 4), (9, 0)])
def test_band_std_is_that_of_the_bands(tmp_path: Path, resolution: int, halvings: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 3, resolution, resolution), dtype=np.uint8)
    metadata = write(tmp_path / "store", images)
    x = torch.from_numpy(images).double() / 127.5 - 1
    assert len(metadata.detail_std) == halvings
    assert len(metadata.level_std) == halvings + 1
    for levels in range(halvings + 1):
        # Straight from the definition: take the mean image away, then look at each band.
        expected = bands.energies(x - x.mean(dim=0), levels).mean(dim=0).sqrt()
        torch.testing.assert_close(
            torch.tensor(metadata.band_std(levels), dtype=torch.float64), expected, rtol=0, atol=1e-6
        )
    with pytest.raises(UserError, match="at most"):
        metadata.band_std(halvings + 1)


def test_sums_do_not_show_how_they_were_grouped() -> None:
    images = some_images(300, 32)
    whole, parts = Moments.of(images, 32), Moments.none(32)
    for size in (7, 1, 292):
        parts.add(Moments.of(images[parts.count : parts.count + size], 32))
    parts.add(Moments.of(images[:20], 32))
    parts.add(Moments.of(images[:20], 32), sign=-1)
    assert (parts.count, parts.squares) == (whole.count, whole.squares)
    np.testing.assert_array_equal(parts.pixels, whole.pixels)
    white = Moments.of(np.full((257, 3, 8, 8), 255, np.uint8), 8)
    assert white.pixels.max() == white.pixels.min() == 257 * 255
    assert white.means() == (1.0, 1.0, 1.0)
    assert whole.means() == tuple(np.round(images.mean(axis=(0, 2, 3)) / 127.5 - 1, 6))


def test_equal_images_deviate_by_nothing(tmp_path: Path) -> None:
    metadata = write(tmp_path / "store", some_images(1, 16).repeat(5, axis=0))
    assert metadata.band_std(2) == (0.0, 0.0, 0.0)


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


def test_nothing_is_in_its_place_before_the_end(tmp_path: Path) -> None:
    path, images = tmp_path / "store", some_images(100, 16)
    with StoreWriter(path, name="some", source="digits", form=Form(16)) as writer:
        writer.add(encode(list(images), [-1] * 100, Form(16)))
        writer.finish()
        assert not path.exists()
    assert names(tmp_path) == ["store"]


class StoppedError(Exception):
    """In the middle."""


def interrupted(path: Path, images: np.ndarray, after: int, identity: str = "x", **options: Any) -> None:
    """Write so many chunks, and leave."""
    form, options = form_of(images), {"labels": ("a", "b", "c"), **options}
    with (
        contextlib.suppress(StoppedError),
        StoreWriter(path, name="some", source="digits", form=form, identity=identity, **options) as writer,
    ):
        for records in chunks(images, form)[:after]:
            writer.add(records)
            writer.tally.position += len(records.values)
            writer.checkpoint()
        raise StoppedError


def gone_on(path: Path, images: np.ndarray, identity: str = "x", **options: Any) -> tuple[int, StoreMetadata]:
    """Where a writer goes on, and what it makes in the end."""
    form, options = form_of(images), {"labels": ("a", "b", "c"), **options}
    with StoreWriter(path, name="some", source="digits", form=form, identity=identity, **options) as writer:
        begun = writer.tally.position
        assert begun == writer.count == writer.tally.moments.count
        for records in chunks(images, form)[begun // 50 :]:
            writer.add(records)
            writer.tally.position += len(records.values)
            writer.checkpoint()
        return begun, writer.finish()


@pytest.mark.parametrize("shard_bytes", [1 << 17, 8 << 30])
def test_a_writer_goes_on_where_another_was_left_and_the_bytes_are_the_same(tmp_path: Path, shard_bytes: int) -> None:
    images = some_images(900, 64)  # A commit is 682 images, or 10 where shards are small.
    options = {"shard_bytes": shard_bytes}
    expected = gone_on(tmp_path / "whole", images, **options)
    for after in (0, 1, 14, 17, 18):
        path = tmp_path / f"after{after}" / "store"
        interrupted(path, images, after, **options)
        committed = after * 50 if shard_bytes < 1 << 20 else 700 * (after >= 14)
        assert gone_on(path, images, **options) == (committed, expected[1])
        assert contents(path) == contents(tmp_path / "whole")
        assert names(path.parent) == ["store"]


def test_what_was_left_by_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    images, path = some_images(900, 64), tmp_path / "store"
    interrupted(path, images, 15)
    assert names(tmp_path) == [".store.part"]
    begun, metadata = gone_on(path, images[:200], identity="y")
    assert (begun, metadata.count) == (0, 200)
    assert names(tmp_path) == ["store"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: (part / "store" / "data-00000.mdb").unlink(),
        lambda part: (part / "store" / "data-00000.mdb").write_bytes(b"junk"),
        lambda part: os.truncate(part / "store" / "digests.bin", 100),
        lambda part: next(part.glob("progress-*")).write_bytes(b"junk"),
        lambda part: next(part.glob("progress-*")).rename(part / "progress-00000001"),
    ],
)
def test_a_damaged_part_is_started_afresh(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    images, path = some_images(900, 64), tmp_path / "store"
    interrupted(path, images, 15)
    damage(tmp_path / ".store.part")
    begun, metadata = gone_on(path, images)
    assert metadata == gone_on(tmp_path / "whole", images)[1]
    assert begun in (0, 700)


def test_a_commit_that_was_cut_between_tally_and_images_is_done_again(tmp_path: Path) -> None:
    images, path = some_images(1500, 64), tmp_path / "store"
    interrupted(path, images, 15)
    one = contents(tmp_path / ".store.part" / "store")
    tally = next((tmp_path / ".store.part").glob("progress-*"))
    first = tally.read_bytes()
    interrupted(path, images, 29)
    # As a kill leaves it: digests and tally of the second commit, and images of the first alone.
    (tmp_path / ".store.part" / tally.name).write_bytes(first)
    (tmp_path / ".store.part" / "store" / "data-00000.mdb").write_bytes(one["data-00000.mdb"])
    assert len(list((tmp_path / ".store.part").glob("progress-*"))) == 2
    begun, metadata = gone_on(path, images)
    assert begun == 700
    assert metadata == gone_on(tmp_path / "whole", images)[1]
    assert contents(path) == contents(tmp_path / "whole")


def test_shards_are_closed_past_their_size_and_read_as_one(tmp_path: Path) -> None:
    images = some_images(300, 32)
    one = write(tmp_path / "one", images)
    many = write(tmp_path / "many", images, shard_bytes=1 << 18)
    assert one.shard_starts == (0,)
    assert names(tmp_path / "many") == [*(f"data-{i:05d}.mdb" for i in range(3)), "digests.bin", "metadata.json"]
    assert many.shard_starts == (0, 100, 200)
    assert all(1 << 18 <= size < 1 << 20 for size in many.shard_bytes)
    assert many.digest == one.digest
    store = ImageStore(tmp_path / "many")
    np.testing.assert_array_equal(store.images(range(300)), images)
    assert [store[i][1] for i in (0, 99, 100, 199, 299)] == [-1, 2, -1, 2, 2]


def test_a_shard_that_is_missing_or_of_another_store_is_named(tmp_path: Path) -> None:
    images = some_images(300, 32)
    write(tmp_path / "many", images, shard_bytes=1 << 18)
    write(tmp_path / "other", images[:20])
    shard = tmp_path / "many" / "data-00001.mdb"
    os.truncate(shard, shard.stat().st_size - 4096)
    assert "data-00001.mdb' is cut short" in fails(tmp_path / "many")
    content = (tmp_path / "other" / "data-00000.mdb").read_bytes()
    shard.write_bytes(content + bytes(1 << 20))
    assert "data-00001.mdb' holds 20 images, expected 100" in fails(tmp_path / "many")
    shard.unlink()
    assert "data-00001.mdb' is missing, expected 3 files" in fails(tmp_path / "many")


def test_equal_images_are_left_out_on_request(tmp_path: Path) -> None:
    images = some_images(8, 16)[[0, 1, 0, 2, 1, 1, 3]]
    with StoreWriter(tmp_path / "store", name="some", source="digits", form=Form(16), deduplicate=True) as writer:
        assert writer.add(encode(list(images[:4]), [-1] * 4, Form(16))) == [None, None, 0, None]
        assert writer.add(encode(list(images[4:]), [-1] * 3, Form(16))) == [1, 1, None]
        metadata = writer.finish()
    np.testing.assert_array_equal(ImageStore(tmp_path / "store").images(range(4)), some_images(4, 16))
    with StoreWriter(tmp_path / "unique", name="some", source="digits", form=Form(16)) as writer:
        writer.add(encode(list(some_images(4, 16)), [-1] * 4, Form(16)))
        assert writer.finish() == metadata


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    assert "no store" in fails(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no store" in fails(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "no store" in fails(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"junk", bytes(20_000), np.random.default_rng(0).bytes(2_000_000)])
def test_a_file_that_is_no_lmdb_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "store", some_images(500, 32))
    (tmp_path / "store" / "data-00000.mdb").write_bytes(content)
    said = fails(tmp_path / "store")
    assert "no LMDB" in said or "cut short" in said


def test_a_store_that_is_cut_short_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store", some_images(500, 32))
    file = tmp_path / "store" / "data-00000.mdb"
    os.truncate(file, file.stat().st_size // 2)
    assert "cut short" in fails(tmp_path / "store")


def test_a_foreign_lmdb_is_named_as_is_a_store_without_its_metadata(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "store"), lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"00000000", b"somebody's")
    assert "half-written, of an older version or another program's" in fails(tmp_path / "store")
    write(tmp_path / "ours", some_images(5, 16))
    (tmp_path / "ours" / "metadata.json").unlink()
    assert "half-written" in fails(tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"version": 99}, "format 99"), ({"version": None}, "format"), ({"more": 1}, "format"), ({"count": 9}, "holds 5")],
)
def test_metadata_of_another_kind_is_named(tmp_path: Path, change: dict[str, int | None], says: str) -> None:
    write(tmp_path / "store", some_images(5, 16))
    file = tmp_path / "store" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert says in fails(tmp_path / "store")


def test_metadata_that_is_no_json_is_named(tmp_path: Path) -> None:
    write(tmp_path / "store", some_images(5, 16))
    (tmp_path / "store" / "metadata.json").write_bytes(b"\xff\xfe")
    assert "format unknown" in fails(tmp_path / "store")


def test_more_shards_than_files_may_be_open_are_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "store", some_images(800, 16), shard_bytes=1 << 14)
    said = tmp_path / "said.txt"

    def with_few_files() -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 3, limits[1]))
        text = fails(tmp_path / "store")
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        said.write_text(text)

    assert os.waitpid(forked(with_few_files), 0)[1] == 0
    assert "cannot be opened (Too many open files)" in said.read_text()
    assert "raise `ulimit -n`" in said.read_text()


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
