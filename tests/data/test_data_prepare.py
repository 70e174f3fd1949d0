"""From raw images to a store, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvdp.config import DatasetParams
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_images(root: Path, per_class: int, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


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
    fine, middle, coarse = metadata.band_deviations(2)
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
    assert tuple(found["detail_deviations"]) == metadata.detail_deviations


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


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_preparing_again_gives_the_same_bytes(tmp_path: Path, encoding: str) -> None:
    images = make_images(tmp_path / "pets", 20)
    files = []
    for name in ("one", "two"):
        prepare(parameters(images, encoding=encoding), tmp_path / name / "store", tmp_path / name / "prepare.json")
        files.append([(tmp_path / name / file).read_bytes() for file in ("store/data.mdb", "prepare.json")])
    assert files[0] == files[1]


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


def test_a_second_preparation_beside_a_running_one_is_refused(tmp_path: Path) -> None:
    images = make_images(tmp_path / "pets", 2)
    with (tmp_path / ".store.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another preparation"):
            prepare(parameters(images), tmp_path / "store")
    assert prepare(parameters(images), tmp_path / "store").count == 4


@pytest.mark.slow
def test_a_preparation_that_is_killed_leaves_no_store_and_the_next_one_succeeds(tmp_path: Path) -> None:
    # One large picture under many names: quick to make and slow to read.
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "0000.png")
    for i in range(1, 2000):
        os.link(images / "0000.png", images / f"{i:04d}.png")
    out = tmp_path / "out" / "store"
    code = (
        "import sys; from pathlib import Path; from dvdp.config import DatasetParams;"
        "from dvdp.data.prepare import prepare;"
        "params = DatasetParams(source='image_folder', path=Path(sys.argv[1]), resolution=128);"
        "prepare(params, Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(images), str(out)])
    try:
        written = out.with_name(".store.part") / "data.mdb"
        deadline = time.monotonic() + 120
        while not (written.exists() and written.stat().st_size > 1 << 20):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        params = DatasetParams(source="image_folder", path=images, resolution=128)
        with pytest.raises(UserError, match="another preparation"):
            prepare(params, out)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert written.exists(), "it was killed in the middle"
    assert not out.exists()
    for image in sorted(images.iterdir())[50:]:
        image.unlink()
    assert prepare(params, out).count == 50
    assert names(out.parent) == [".store.lock", "store"]
    store = ImageStore(out)
    np.testing.assert_array_equal(store[0][0], store[49][0])
