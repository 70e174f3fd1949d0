"""``dvdp verify`` finds every damage and names it; ``dvdp stats`` tells what a store is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvdp.config import DatasetParams
from dvdp.data import prepare as prepare_module
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.data.verify import verify
from dvdp.errors import UserError
from pipelines.cli import main
from tests.data.support import make_images


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a prepared data set of 60 images in two shards."""
    make_images(tmp_path / "pets", 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "_MOST", 20)
    prepare(
        DatasetParams(name="pets", source="image_folder", path=Path("pets"), resolution=32, shard_gib=2**-14),
        Path("data/pets/store"),
    )
    Path("params.yaml").write_text("dataset: {name: pets, source: image_folder, path: pets, resolution: 32}\n")
    return tmp_path


STORE = Path("data/pets/store")


def flip(index: int, place: int = 100) -> None:
    """Another value for one byte of an image's pixels."""
    image, _ = ImageStore(STORE)[index]
    for file in STORE.glob("*.mdb"):
        content = bytearray(file.read_bytes())
        if (start := content.find(image.tobytes())) >= 0:
            content[start + place] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError("no such image")


def damage() -> str:
    with pytest.raises(UserError) as error:
        verify(STORE, workers=0)
    text = str(error.value)
    assert "\n" not in text
    assert ". " not in text
    assert "dvdp prepare" in text
    return text


def test_the_command_is_content_with_a_good_store_and_names_a_damaged_image(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("60 images in data/pets/store are as they were prepared, digest ")
    flip(41)
    assert main(["verify"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "dvdp: data set: found 1 of 60 images damaged in 'data/pets/store' (number 41), expected each to match its"
        " digest; run `dvdp prepare` again."
    )


@pytest.mark.usefixtures("project")
def test_many_damaged_images_are_counted_and_the_first_are_named() -> None:
    for index in range(5, 55, 2):
        flip(index)
    named = ", ".join(str(index) for index in range(5, 45, 2))
    assert f"found 25 of 60 images damaged in '{STORE}' (number {named}, ..)" in damage()


@pytest.mark.usefixtures("project")
def test_a_label_is_part_of_an_image() -> None:
    flip(3, place=-4)
    assert "(number 3)" in damage()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: b"x" + c[1:], lambda c: b""])
def test_digests_that_are_damaged_are_named_themselves(change: Callable[[bytes], bytes]) -> None:
    file = STORE / "digests.bin"
    file.write_bytes(change(file.read_bytes()))
    assert "digests.bin' has SHA-256" in damage()
    file.unlink()
    assert "digests.bin' has SHA-256 nothing" in damage()


@pytest.mark.slow
def test_damage_to_the_structure_of_a_file_is_one_sentence_too(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = STORE / "data-00001.mdb"
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    inner = [page for page in range(2, len(content) // 4096) if content[4096 * page + 10] & 3]  # branches and leaves
    noise = np.random.default_rng(0)
    for page in inner:
        content[4096 * page + 16 : 4096 * (page + 1)] = noise.integers(0, 256, 4080)
    file.write_bytes(content.tobytes())
    assert main(["verify"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dvdp: data set: ")
    assert line.endswith("run `dvdp prepare` again.")


def test_stats_say_what_a_store_is_and_show_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats"]) == 0
    *lines, picture = capsys.readouterr().out.splitlines()
    said = {line[:10].strip(): line[11:] for line in lines}
    metadata = ImageStore(STORE).metadata
    assert said["images"] == "60 of 32 px"
    assert said["labels"] == "cat 30, dog 30"
    assert said["left out"] == "0 unreadable, 0 duplicates"
    assert said["stored as"] == f"raw, {sum(metadata.shard_bytes):,} bytes, files: 2"
    mean = ImageStore(STORE).images(range(60)).mean(axis=(0, 2, 3)) / 127.5 - 1
    assert said["mean"] == f"red {mean[0]:.4f}, green {mean[1]:.4f}, blue {mean[2]:.4f}"
    assert said["deviation"].startswith(f"band 0 {metadata.detail_std[0]:.4f}, band 1 ")
    assert picture == "contact_sheet.png"
    with Image.open(project / picture) as sheet:
        assert sheet.size == (8 * 98 + 2, 8 * 98 + 2)
    assert main(["stats", "--out", "sheet.jpg"]) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err


def test_stats_and_verify_of_nothing_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("dataset: {name: digits}\n")
    for command in ("stats", "verify"):
        assert main([command]) == 2
        assert "found no store at 'data/digits/store'" in capsys.readouterr().err
