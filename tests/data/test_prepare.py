"""From raw images to a store, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvdp.config import DatasetParams
from dvdp.data.prepare import _identity, prepare
from dvdp.data.sources import SOURCES
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from tests.data.support import EndingSource, contents, make_images, names

#: Recorded before images had colour profiles and filters.
DIGITS = "e17f40e989cbb0387505f796fcf55847b8f12878435a95c54b57297e10f38400"


def parameters(path: Path, **options: object) -> DatasetParams:
    return DatasetParams(name="pets", source="image_folder", path=path, resolution=16, **options)


def test_digits_become_a_store(tmp_path: Path) -> None:
    metadata = prepare(DatasetParams(), tmp_path / "digits" / "store", tmp_path / "digits" / "prepare.json")
    store = ImageStore(tmp_path / "digits" / "store")
    assert store.metadata == metadata
    assert (len(store), metadata.resolution, metadata.labels) == (1797, 32, tuple("0123456789"))
    assert [store[i][1] for i in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    image = store[0][0].astype(int)
    assert (image[0] == image[1]).all()
    assert image.max() > 200
    assert image[:, :, :4].max() < 30, "the margin is black"
    # The finest band of eightfold pixels holds little: that is what makes turning points possible at 32 px.
    fine, middle, coarse = metadata.band_std(2)
    assert fine < middle < coarse


def test_the_report_tells_what_was_found(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 3)
    (images / "cat" / "broken.png").write_bytes(b"no image")
    (images / "dog" / "short.png").write_bytes((images / "dog" / "000.png").read_bytes()[:300])
    report = tmp_path / "reports" / "prepare.json"
    metadata = prepare(parameters(images, max_skipped=0.25), tmp_path / "out" / "store", report)
    assert (metadata.count, metadata.skipped) == (6, 2)
    assert [label for _, label in map(ImageStore(tmp_path / "out" / "store").__getitem__, range(6))] == [0] * 3 + [
        1
    ] * 3
    found = json.loads(report.read_text())
    assert found["images_found"] == 8
    assert found["count"] == 6
    assert found["skipped"] == 2
    assert found["skipped_images"].keys() == {"cat/broken.png", "dog/short.png"}
    assert "truncated" in found["skipped_images"]["dog/short.png"]
    assert found["labels"] == [{"label": "cat", "images": 3}, {"label": "dog", "images": 3}]
    assert found["unlabelled"] == 0
    assert found["digest"] == metadata.digest
    assert found["resolution"] == 16
    assert tuple(found["detail_std"]) == metadata.detail_std


def test_too_many_unreadable_images_are_an_error_that_keeps_the_old_store(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 3)
    out, report = tmp_path / "out" / "store", tmp_path / "prepare.json"
    prepare(parameters(images), out, report)
    (images / "cat" / "000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 unreadable images among 6, 'cat/000\.png' first .* 0\.1 of them") as error:
        prepare(parameters(images, max_skipped=0.1), out, report)
    assert str(report) in str(error.value)
    assert json.loads(report.read_text())["skipped_images"] == {"cat/000.png": "no image in a known format"}
    assert len(ImageStore(out)) == 6
    assert names(out.parent) == [".store.lock", "store"]


def test_a_set_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="all 1 images are unreadable"):
        prepare(parameters(tmp_path / "pets", max_skipped=1), tmp_path / "out" / "store")
    assert not (tmp_path / "out" / "store").exists()


def test_the_report_names_at_most_a_hundred(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 1)
    for i in range(150):
        (images / "cat" / f"broken{i:03d}.png").write_bytes(b"no image")
    report = tmp_path / "prepare.json"
    prepare(parameters(images, max_skipped=1), tmp_path / "store", report)
    found = json.loads(report.read_text())
    assert found["skipped"] == 150
    assert len(found["skipped_images"]) == 100


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_preparing_again_gives_the_same_bytes(tmp_path: Path, encoding: str) -> None:
    images = make_images(tmp_path / "pets", 20)
    for name in ("one", "two"):
        prepare(parameters(images, encoding=encoding), tmp_path / name / "store", tmp_path / name / "prepare.json")
    assert contents(tmp_path / "one" / "store") == contents(tmp_path / "two" / "store")
    one, two = ((tmp_path / name / "prepare.json").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_filter_is_part_of_the_store_and_of_what_is_gone_on_with(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 3)
    stores = {}
    for resize in ("area", "lanczos", "bicubic"):
        out = tmp_path / resize
        params = parameters(images, resize=resize)
        stores[resize] = prepare(params, out / "store", out / "prepare.json")
        assert json.loads((out / "prepare.json").read_text())["resize"] == stores[resize].resize == resize
        assert ImageStore(out / "store").metadata.form.resize == resize
    assert len({metadata.digest for metadata in stores.values()}) == 3
    assert prepare(parameters(images), tmp_path / "again").digest == stores["area"].digest
    source = SOURCES["image_folder"](images)
    identities = {_identity(parameters(images, resize=resize), source) for resize in stores}
    assert len(identities) == 3


def test_the_store_of_the_digits_is_the_one_it_always_was(tmp_path: Path) -> None:
    assert prepare(DatasetParams(), tmp_path / "store").digest == DIGITS


def test_a_store_of_before_was_averaged(tmp_path: Path) -> None:
    prepare(parameters(make_images(tmp_path / "pets", 3)), tmp_path / "store")
    file = tmp_path / "store" / "metadata.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "resize"}))
    assert ImageStore(tmp_path / "store").metadata.resize == "area"


def with_all_that_happens(root: Path) -> DatasetParams:
    """More than one chunk, with unreadable images and equal ones."""
    images = make_images(root, 150)
    for i in (3, 140):
        (images / "cat" / f"{i:03d}.png").write_bytes(b"no image")
        shutil.copy(images / "cat" / "010.png", images / "dog" / f"{i:03d}.png")
    return parameters(images, encoding="jpeg", jpeg_quality=90, deduplicate=True, shard_gib=2**-14)


def check_workers(root: Path, numbers: tuple[int, ...]) -> None:
    params = with_all_that_happens(root / "pets")
    for workers in (0, *numbers):
        out = root / f"by{workers}"
        metadata = prepare(replace(params, workers=workers), out / "store", out / "prepare.json")
        assert (metadata.count, metadata.skipped, metadata.duplicates) == (296, 2, 2)
        assert len(metadata.shard_starts) > 1
        assert contents(out / "store") == contents(root / "by0" / "store")
        assert (out / "prepare.json").read_bytes() == (root / "by0" / "prepare.json").read_bytes()
    assert ImageStore(root / "by0" / "store")[200][1] == 1


def test_two_processes_give_the_same_bytes_as_none(tmp_path: Path) -> None:
    check_workers(tmp_path, (2,))


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    check_workers(tmp_path, (1, 3))


def test_equal_images_are_left_out_and_named_on_request(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 3)
    for copy in ("cat/x.png", "dog/000.png"):
        shutil.copy(images / "cat" / "001.png", images / copy)
    report = tmp_path / "prepare.json"
    assert prepare(parameters(images), tmp_path / "all", report).count == 7
    assert json.loads(report.read_text())["duplicates"] == 0
    metadata = prepare(parameters(images, deduplicate=True), tmp_path / "store", report)
    assert (metadata.count, metadata.duplicates, metadata.label_counts) == (5, 2, (3, 2, 0))
    found = json.loads(report.read_text())
    assert (found["images_found"], found["count"], found["duplicates"]) == (7, 5, 2)
    assert found["duplicate_images"] == [{"image": "cat/x.png", "equals": 1}, {"image": "dog/000.png", "equals": 1}]
    for copy in ("cat/x.png", "dog/000.png"):
        (images / copy).unlink()
    prepare(parameters(images), tmp_path / "without")
    assert contents(tmp_path / "without")["data-00000.mdb"] == contents(tmp_path / "store")["data-00000.mdb"]


def test_a_process_that_is_ended_from_outside_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "ending", EndingSource)
    params = DatasetParams(source="ending", resolution=8, workers=1)
    with pytest.raises(UserError, match=r"^dataset\.workers: .* with fewer than 1\.$"):
        prepare(params, tmp_path / "store")
    assert names(tmp_path) == [".store.lock"]


def test_odd_images_all_become_training_images(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for name, image in {
        "grey.png": Image.new("L", (30, 20), 100),
        "sixteen.png": Image.fromarray(np.full((20, 30), 25700, np.uint16)),
        "alpha.png": Image.new("RGBA", (30, 20), (100, 100, 100, 255)),
        "cmyk.jpg": Image.new("CMYK", (30, 20), (155, 155, 155, 0)),
        "pixel.png": Image.new("RGB", (1, 1), (100, 100, 100)),
        "line.png": Image.new("RGB", (900, 1), (100, 100, 100)),
    }.items():
        image.save(tmp_path / "odd" / name)
    metadata = prepare(parameters(tmp_path / "odd", max_skipped=0), tmp_path / "store")
    assert metadata.count == 6
    assert metadata.labels == ()
    pixels = ImageStore(tmp_path / "store").images(range(6)).astype(int)
    assert np.abs(pixels - 100).max() <= 2


def test_an_unknown_path_leaves_nothing_behind_but_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing at"):
        prepare(parameters(tmp_path / "nowhere"), tmp_path / "out" / "store")
    assert names(tmp_path / "out") == [".store.lock"]


def test_places_that_cannot_be_written_are_one_sentence_and_cost_nothing(tmp_path: Path) -> None:
    params, out = parameters(make_images(tmp_path / "pets", 2)), tmp_path / "out" / "store"
    (tmp_path / "file").touch()
    for store, report in ((tmp_path / "file" / "store", None), (out, tmp_path / "file" / "prepare.json")):
        with pytest.raises(UserError, match=r"^data set: cannot write '.*/file/.*' \(.*\), expected free space"):
            prepare(params, store, report)
    assert names(out.parent) == [".store.lock"]
    assert prepare(params, out, tmp_path / "prepare.json").count == 4


def test_a_second_preparation_beside_a_running_one_is_refused(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 2)
    with (tmp_path / ".store.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another preparation"):
            prepare(parameters(images), tmp_path / "store")
    assert prepare(parameters(images), tmp_path / "store").count == 4
