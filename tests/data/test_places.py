"""What writing a store and its report needs is checked before any work."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dvdp.config import DatasetParams
from dvdp.data import prepare as prepare_module
from dvdp.data.places import check_space
from dvdp.data.prepare import prepare
from dvdp.data.records import Form
from dvdp.errors import UserError
from tests.data.support import make_images, names


@pytest.fixture
def params(tmp_path: Path) -> DatasetParams:
    return DatasetParams(name="pets", source="image_folder", path=make_images(tmp_path / "pets", 2), resolution=16)


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is looked at is a failure: the places come first."""
    monkeypatch.setattr(prepare_module, "SOURCES", {})


def fails(params: DatasetParams, out: Path, report: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        prepare(params, out, report)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data set: ")
    return str(error.value)


@pytest.mark.usefixtures("_no_work")
def test_a_store_that_is_a_link_is_refused(tmp_path: Path, params: DatasetParams) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "elsewhere")
    assert "is a link, expected a folder or nothing there" in fails(params, tmp_path / "store")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "is a link" in fails(params, tmp_path / "dangling")
    (tmp_path / ".other.part").symlink_to(tmp_path / "elsewhere")
    assert "'; remove it." in fails(params, tmp_path / "other").replace("store'", "'")


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("name", [".", "prepare.json", "below/prepare.json"])
def test_a_report_in_the_store_or_in_place_of_a_folder_is_refused(
    tmp_path: Path, params: DatasetParams, name: str
) -> None:
    text = fails(params, tmp_path / "store", tmp_path / "store" / name)
    assert "is a folder or inside the store" in text
    (tmp_path / "folder").mkdir()
    assert "is a folder or inside the store" in fails(params, tmp_path / "store", tmp_path / "folder")


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "file/prepare.json", "circle/prepare.json"])
def test_a_report_or_store_that_cannot_be_written_is_refused(tmp_path: Path, params: DatasetParams, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    assert "cannot write" in fails(params, tmp_path / "store", tmp_path / name)
    assert "cannot write" in fails(params, tmp_path / name)


@pytest.mark.usefixtures("_no_work")
def test_folders_without_the_right_to_write_are_refused(tmp_path: Path, params: DatasetParams) -> None:
    for name in ("store", "a/store"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "store").chmod(0o555)
    (tmp_path / "a").chmod(0o555)
    if os.access(tmp_path / "a", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "Permission denied" in fails(params, tmp_path / "store")
    assert "Permission denied" in fails(params, tmp_path / "a" / "store")
    assert "Permission denied" in fails(params, tmp_path / "b", tmp_path / "a" / "prepare.json")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_mount_points_read_only_disks_and_small_ones_are_refused(small_disk: Path, params: DatasetParams) -> None:
    assert "is a mount point" in fails(params, small_disk)
    text = fails(DatasetParams(), small_disk / "store")
    assert "bytes free for" in text
    assert "for 1,797 images of 32 px as raw" in text
    assert names(small_disk) == [".store.lock"]
    assert prepare(params, small_disk / "store", small_disk / "prepare.json").count == 4
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in fails(params, small_disk / "store")


class Usage(NamedTuple):
    free: int


@pytest.mark.parametrize("form", [Form(8), Form(16), Form(32), Form(64)], ids=lambda form: str(form.resolution))
def test_the_space_for_raw_images_is_what_they_take(
    tmp_path: Path, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path / "pets", 200)
    params = DatasetParams(name="pets", source="image_folder", path=images, resolution=form.resolution)
    prepare(params, tmp_path / "store")
    taken = sum(file.stat().st_size for file in (tmp_path / "store").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(round(1.1 * taken)))
    check_space(tmp_path / "other", form, 400)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(round(0.8 * taken)))
    with pytest.raises(UserError, match="bytes free"):
        check_space(tmp_path / "other", form, 400)
    # What an interrupted preparation has written is there already.
    (tmp_path / "store").rename(tmp_path / ".other.part")
    check_space(tmp_path / "other", form, 400)


def test_photographs_are_not_refused_for_space_that_their_encoding_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(40_000_000))
    for encoding in ("png", "jpeg"):
        check_space(tmp_path / "store", Form(256, encoding), 1000)
    with pytest.raises(UserError, match="as raw; free some"):
        check_space(tmp_path / "store", Form(256), 1000)
