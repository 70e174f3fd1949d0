"""Parquet, webdataset, .npz and Imagenet 64 are read as they are handed out, and what is wrong with them is named."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvdp.config import DatasetParams
from dvdp.data.prepare import prepare
from dvdp.data.sources import SOURCES, UnreadableImageError
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from tests.data.support import make_tar, make_zip, png

RANDOM = np.random.default_rng(0)


def read(name: str, path: Path) -> list[tuple[str, str | None, int]]:
    """Name, label and the red of the first pixel of each image."""
    source = SOURCES[name](path)
    found = [(item.name, item.label, int(item.load()[0, 0, 0])) for item in source]
    assert source.count == len(found)
    assert {label for _, label, _ in found} - {None} <= set(source.labels)
    return found


def told(name: str, path: Path) -> str:
    """The error of reading all of it, or ""."""
    try:
        for item in SOURCES[name](path):
            item.read()
    except UserError as error:
        return str(error)
    return ""


def fails(name: str, path: Path) -> str:
    text = told(name, path)
    assert text.startswith("dataset.")
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["parquet", "webdataset", "npz", "imagenet64"])
def test_a_path_that_is_missing_empty_or_of_another_kind_is_named(name: str, tmp_path: Path) -> None:
    assert "found nothing" in (text := fails(name, tmp_path / "gone")) or "found no file" in text
    assert "expected" in fails(name, tmp_path / "gone" / "x-*.tar")
    (tmp_path / "empty").mkdir()
    assert "found no " in fails(name, tmp_path / "empty")
    (tmp_path / "text").write_text("text")
    assert "damaged" in fails(name, tmp_path / "text")
    (tmp_path / "nothing").touch()
    assert "damaged" in fails(name, tmp_path / "nothing")
    with pytest.raises(UserError, match="path: found nothing, expected"):
        DatasetParams(source=name)


# Parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(
    path: Path, columns: Mapping[str, pa.Array], features: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """A file as the library ``datasets`` writes it."""
    table = pa.table(dict(columns))
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def images(values: Sequence[int]) -> pa.Array:
    return pa.array([{"bytes": png(value), "path": f"{value}.png"} for value in values], IMAGE)


CLASSES = {"image": {"_type": "Image"}, "label": {"names": ["zebra", "ant", "bee"], "_type": "ClassLabel"}}


def test_parquet_of_the_hub_is_read_in_the_order_of_its_files_and_classes(tmp_path: Path) -> None:
    for i, labels in ((10, [2, -1]), (2, [0, None]), (1, [1, 1])):
        columns = {"image": images([i, i + 100]), "label": pa.array(labels, pa.int64()), "id": pa.array([1, 2])}
        parquet(tmp_path / "data" / f"train-{i}-of-3.parquet", columns, CLASSES)
    (tmp_path / "README.md").write_text("a card")
    source = SOURCES["parquet"](tmp_path)
    assert source.labels == ("zebra", "ant", "bee")
    assert source.left_out.counts == {"other format": 1}
    assert read("parquet", tmp_path) == [
        ("train-1-of-3.parquet/000000", "ant", 1),
        ("train-1-of-3.parquet/000001", "ant", 101),
        ("train-2-of-3.parquet/000000", "zebra", 2),
        ("train-2-of-3.parquet/000001", None, 102),
        ("train-10-of-3.parquet/000000", "bee", 10),
        ("train-10-of-3.parquet/000001", None, 110),
    ]
    metadata = prepare(DatasetParams(source="parquet", path=tmp_path, resolution=4), tmp_path / "out" / "store")
    assert metadata.label_counts == (1, 2, 1, 2)


def test_a_pattern_names_a_split_and_a_folder_of_several_is_refused(tmp_path: Path) -> None:
    for name in (
        "train-00000-of-00002-0123456789abcdef",
        "train-00001-of-00002-fedcba9876543210",
        "test-00000-of-00001",
    ):
        parquet(tmp_path / f"{name}.parquet", {"image": images([len(name)])})
    text = fails("parquet", tmp_path)
    assert f"several splits or data sets in '{tmp_path}' (test, train)" in text
    assert f"such as '{tmp_path}/test*'" in text
    pattern = tmp_path / "train-*.parquet"
    assert len(read("parquet", pattern)) == 2
    assert len(read("parquet", tmp_path / "test-00000-of-00001.parquet")) == 1
    assert prepare(DatasetParams(source="parquet", path=pattern, resolution=4), tmp_path / "out" / "store").count == 2


def test_columns_are_found_by_the_metadata_and_values_are_classes_without_it(tmp_path: Path) -> None:
    features = {
        "img": {"_type": "Image"},
        "fine": {"names": ["a", "b"], "_type": "ClassLabel"},
        "n": {"_type": "Value"},
    }
    columns = {"img": images([5, 6]), "fine": pa.array([1, 0]), "n": pa.array([1, 2])}
    assert read("parquet", parquet(tmp_path / "a.parquet", columns, features)) == [
        ("a.parquet/000000", "b", 5),
        ("a.parquet/000001", "a", 6),
    ]
    for labels, expected in (
        (pa.array([10, 9, None], pa.int32()), ("9", "10")),
        (pa.array(["dog", "cat", "dog"]), ("cat", "dog")),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode().cast(pa.string()), ("cat", "dog")),
    ):
        path = parquet(tmp_path / "b.parquet", {"image": images([1, 2, 3]), "label": labels})
        assert SOURCES["parquet"](path).labels == expected
    plain = parquet(tmp_path / "c.parquet", {"image": pa.array([png(7)], pa.large_binary())})
    assert read("parquet", plain) == [("c.parquet/000000", None, 7)]


def test_rows_without_an_image_are_unreadable_and_no_file_is_opened_for_them(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    rows = [None, {"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": b"text", "path": None}]
    source = SOURCES["parquet"](parquet(tmp_path / "a.parquet", {"image": pa.array(rows, IMAGE)}))
    reasons = []
    for item in source:
        with pytest.raises(UnreadableImageError) as error:
            item.load()
        reasons.append(str(error.value))
    assert reasons[0] == "no image"
    assert "no image, but the path" in reasons[1]
    assert reasons[2] == "no image in a known format"


def test_wrong_parquet_files_are_named(tmp_path: Path) -> None:
    def wrong(columns: Mapping[str, pa.Array], features: Mapping[str, Any] | None = None) -> str:
        return fails("parquet", parquet(tmp_path / "a.parquet", columns, features))

    assert "found columns pixels, label in" in wrong({"pixels": pa.array([1]), "label": pa.array([1])})
    assert "found list<element: int64> in column 'image'" in wrong({"image": pa.array([[1, 2]])})
    assert "found double in column 'label'" in wrong({"image": images([1]), "label": pa.array([0.5])})
    assert "found 3 in column 'label'" in wrong({"image": images([1]), "label": pa.array([3])}, CLASSES)
    assert "found -2 in column 'label'" in wrong({"image": images([1]), "label": pa.array([-2])}, CLASSES)
    same = {**CLASSES, "label": {"names": ["a", "a"], "_type": "ClassLabel"}}
    assert "two classes of one name" in wrong({"image": images([1]), "label": pa.array([0])}, same)
    two = {name: {"names": ["a"], "_type": "ClassLabel"} for name in ("fine", "coarse")}
    assert "found columns fine, coarse of kind ClassLabel" in wrong(
        {"image": images([1]), "fine": pa.array([0]), "coarse": pa.array([0])}, two
    )
    for features in ([], {"image": 5, "label": {"_type": ["x"]}}, {"label": {"_type": "ClassLabel", "names": None}}):
        path = parquet(tmp_path / "b.parquet", {"image": images([1]), "label": pa.array([0])}, features)
        assert SOURCES["parquet"](path).labels == ("0",)
    parquet(tmp_path / "set" / "train-0.parquet", {"image": images([1]), "label": pa.array([0])}, CLASSES)
    parquet(tmp_path / "set" / "train-1.parquet", {"image": images([1])}, CLASSES)
    assert "other columns or classes in" in fails("parquet", tmp_path / "set")


def test_damage_to_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": images(range(50)), "label": pa.array([1] * 50)}, row_group_size=10)
    whole = path.read_bytes()
    for content in (
        whole[:-1],
        whole[:200],
        whole[:300] + bytes(200) + whole[500:],
        whole[:-200] + bytes(190) + whole[-10:],
    ):
        path.write_bytes(content)
        assert "damaged one" in fails("parquet", path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": images([1])})
    real = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert "run `pip install pyarrow`" in fails("parquet", path)


# Webdataset


def test_shards_of_webdataset_are_read_in_order_with_their_classes(tmp_path: Path) -> None:
    for i in (10, 9):
        files = {
            f"{i}/a.cls": b"10\n", f"{i}/a.jpg": png(i), f"{i}/a.json": b"{}",
            f"{i}/b.png": png(i + 1), f"{i}/b.seg.png": png(), f"{i}/b.cls": b" 9",
            f"{i}/c.webp": png(i + 2), f"{i}/c.txt": b"a caption",
        }  # fmt: skip
        make_tar(tmp_path / f"train-{i}.tar", files)
    source = SOURCES["webdataset"](tmp_path)
    assert source.labels == ("9", "10")
    assert sum(source.left_out.counts.values()) == 6
    assert read("webdataset", tmp_path) == [
        ("train-9.tar/9/a.jpg", "10", 9),
        ("train-9.tar/9/b.png", "9", 10),
        ("train-9.tar/9/c.webp", None, 11),
        ("train-10.tar/10/a.jpg", "10", 10),
        ("train-10.tar/10/b.png", "9", 11),
        ("train-10.tar/10/c.webp", None, 12),
    ]
    metadata = prepare(DatasetParams(source="webdataset", path=tmp_path, resolution=4), tmp_path / "out" / "store")
    assert metadata.label_counts == (2, 2, 2)
    assert ImageStore(tmp_path / "out" / "store")[0][1] == 1


def test_classes_of_webdataset_may_be_words_and_a_single_tar_is_enough(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "a.tar.gz", {"0.jpg": png(1), "0.cls": "Bär".encode(), "1.cls": b"007", "1.jpg": png(2)}, "w:gz"
    )
    assert read("webdataset", path) == [("a.tar.gz/0.jpg", "Bär", 1), ("a.tar.gz/1.jpg", "7", 2)]
    alone = SOURCES["webdataset"](make_tar(tmp_path / "b.tar", {"0.jpg": png(1), "1.cls": b"7"}))
    assert (alone.count, alone.labels) == (1, ())
    assert alone.left_out.counts == {"class without an image": 1}


def test_wrong_tars_of_webdataset_are_named(tmp_path: Path) -> None:
    def wrong(files: Mapping[str, bytes | None]) -> str:
        return fails("webdataset", make_tar(tmp_path / "x.tar", files))

    assert "found 2 images in sample 'a'" in wrong({"a.jpg": png(), "a.png": png()})
    assert "found no images in" in wrong({"a.txt": b"text", "b.input.png": png()})
    for content in (b"", b"\xff\xfe", b"two\nlines", b"x" * 200, bytes(4)):
        assert "in 'a.cls' of" in wrong({"a.jpg": png(), "a.cls": content})
    path = make_tar(tmp_path / "y.tar", {f"{i}.jpg": png() for i in range(5)})
    path.write_bytes(path.read_bytes()[:2500])
    assert "damaged" in fails("webdataset", path)
    make_tar(tmp_path / "set" / "train-0.tar", {"a.jpg": png()}) if (tmp_path / "set").mkdir() else None
    make_tar(tmp_path / "set" / "val-0.tar", {"a.jpg": png()})
    make_tar(tmp_path / "set" / "train-0.tar", {"a.jpg": png()})
    assert "(train, val)" in fails("webdataset", tmp_path / "set")


# Arrays

PIXELS = RANDOM.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_guided_diffusion_is_read(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", PIXELS, np.array([3, 3, 10, 9, 3]))
    source = SOURCES["npz"](tmp_path / "a.npz")
    assert (source.count, source.labels) == (5, ("3", "9", "10"))
    assert [item.label for item in source] == ["3", "3", "10", "9", "3"]
    np.testing.assert_array_equal([item.load() for item in source], PIXELS)
    # As reference batches have more arrays, which are not read.
    save(tmp_path / "b.npz", PIXELS, mu=np.zeros(3), sigma=np.asfortranarray(np.ones((3, 3))), x=np.array([{}], object))
    source = SOURCES["npz"](tmp_path / "b.npz")
    assert (source.count, source.labels, [item.label for item in source]) == (5, (), [None] * 5)
    metadata = prepare(DatasetParams(source="npz", path=tmp_path / "a.npz", resolution=4), tmp_path / "out" / "store")
    assert metadata.label_counts == (3, 1, 1, 0)
    np.testing.assert_array_equal(ImageStore(tmp_path / "out" / "store")[0][0], PIXELS[0, :, 1:5].transpose(2, 0, 1))


def test_an_npz_is_not_loaded_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((200, 64, 64, 3), np.uint8))
    tracemalloc.start()
    try:
        assert sum(item.load().shape == (64, 64, 3) for item in SOURCES["npz"](tmp_path / "a.npz")) == 200
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # Of 2.5 million.
    finally:
        tracemalloc.stop()


class Dangerous:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


def test_wrong_npz_files_are_named_and_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def wrong(**arrays: np.ndarray) -> str:
        np.savez(path, **arrays)
        return fails("npz", path)

    assert "found images of uint8 (5, 4, 6, 3) in" in wrong(images=PIXELS)
    assert "found arr_0 of float64 (5, 4, 6, 3) in" in wrong(arr_0=PIXELS / 255)
    assert "found arr_0 of uint8 (5, 4, 6) in" in wrong(arr_0=PIXELS[..., 0])
    assert "found arr_0 of uint8 (5, 3, 4, 6) in" in wrong(arr_0=PIXELS.transpose(0, 3, 1, 2).copy())
    assert "found arr_1 of int64 (4,) in" in wrong(arr_0=PIXELS, arr_1=np.arange(4))
    assert "found arr_1 of float64 (5,) in" in wrong(arr_0=PIXELS, arr_1=np.arange(5) / 2)
    assert "(5, 4, 6, 3) in Fortran order in" in wrong(arr_0=np.asfortranarray(PIXELS))
    assert "found arr_1 of object (5,), which is pickled" in wrong(
        arr_0=PIXELS, arr_1=np.array([Dangerous()] * 5, object)
    )
    assert "found arr_0 of object (5,), which is pickled" in wrong(arr_0=np.array([Dangerous()] * 5, object))
    assert "found no arrays" in fails("npz", make_zip(path, {}))
    assert "damaged one" in fails("npz", make_zip(path, {"arr_0.npy": b"text", "arr_1.npy": b""}))
    np.save(path.with_suffix(".npy"), PIXELS)
    assert "no .npz file" in fails("npz", path.with_suffix(".npy"))


def test_damage_to_any_part_of_an_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, PIXELS, np.arange(5))
    whole = path.read_bytes()
    found = []
    for place in range(4, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found.append(told("npz", path))
    assert sum(map(bool, found)) > len(found) * 0.8
    assert not any("\n" in text for text in found)
    path.write_bytes(whole[:-40])
    assert "damaged" in fails("npz", path)


def batch(path: Path, side: int, labels: Sequence[int], **more: np.ndarray) -> np.ndarray:
    """As downsampled ImageNet has them; the images (n, 3, side, side)."""
    data = RANDOM.integers(0, 256, (len(labels), 3, side, side), dtype=np.uint8)
    np.savez(path, data=data.reshape(len(labels), -1), labels=np.array(labels), **more)
    return data


@pytest.mark.parametrize("side", [64, 32])
def test_the_batches_of_imagenet64_are_read_in_order(tmp_path: Path, side: int) -> None:
    numbers = [1, 10, *range(2, 10)]
    data = {i: batch(tmp_path / f"train_data_batch_{i}.npz", side, [i, 1000], mean=np.zeros(3)) for i in numbers}
    batch(tmp_path / "val_data.npz", side, [1])
    source = SOURCES["imagenet64"](tmp_path)
    assert source.count == 20
    assert source.labels == (*map(str, range(1, 11)), "1000")
    assert source.left_out.names == {"other format": ["val_data.npz"]}
    items = list(source)
    assert [item.label for item in items[::2]] == [str(i) for i in range(1, 11)]
    np.testing.assert_array_equal(items[19].load(), data[10][1].transpose(1, 2, 0))
    assert items[19].name == "train_data_batch_10.npz/000001"
    assert SOURCES["imagenet64"](tmp_path / "val_data.npz").count == 1
    metadata = prepare(DatasetParams(source="imagenet64", path=tmp_path, resolution=side), tmp_path / "out" / "store")
    assert metadata.count == 20
    np.testing.assert_array_equal(ImageStore(tmp_path / "out" / "store")[19][0], data[10][1])


def test_wrong_batches_of_imagenet64_are_named_and_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "train_data_batch_1.npz"
    np.savez(path, data=PIXELS, labels=np.arange(5))
    assert "found data of uint8 (5, 4, 6, 3), labels of int64 (5,)" in fails("imagenet64", tmp_path)
    np.savez(path, data=np.zeros((5, 12288), np.uint8))
    assert "found data of uint8 (5, 12288) in" in fails("imagenet64", path)
    np.savez(path, data=np.zeros((5, 12288), np.uint8), labels=np.array([Dangerous()] * 5, object))
    assert "found labels of object (5,), which is pickled" in fails("imagenet64", path)
    for i in (1, 3):
        batch(tmp_path / f"train_data_batch_{i}.npz", 8, [1])
    assert "found batches 1, 3 in" in fails("imagenet64", tmp_path)
    pickled = tmp_path / "old" / "train_data_batch_1"
    pickled.parent.mkdir()
    pickled.write_bytes(pickle.dumps({"data": Dangerous(), "labels": [1]}))
    for wrong in (pickled, pickled.parent):
        assert f"'{pickled}' is pickled, which can run code" in fails("imagenet64", wrong)
    buffer = io.BytesIO()
    np.savez(buffer, data=np.zeros((1, 192), np.uint8), labels=np.array([1]))
    with zipfile.ZipFile(tmp_path / "Imagenet64_train_part1_npz.zip", "w") as archive:
        archive.writestr("train_data_batch_1.npz", buffer.getvalue())
    assert "no .npz file of numbers" in fails("imagenet64", tmp_path / "Imagenet64_train_part1_npz.zip")
