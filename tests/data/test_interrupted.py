"""Preparing goes on where it was ended, at whatever moment, and the result is that of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from PIL import Image

from dvdp.config import DatasetParams
from dvdp.data import prepare as prepare_module
from dvdp.data import writer as writer_module
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.data.transforms import prepare_transform
from dvdp.errors import UserError
from tests.data.support import contents, encoded, forked, make_images, make_tar, names


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images each. A process that is forked has them too."""
    monkeypatch.setattr(prepare_module, "_MOST", 5)
    monkeypatch.setattr(prepare_module, "_FEWEST", 5)
    monkeypatch.setattr(writer_module, "_COMMIT_IMAGES", 10)
    monkeypatch.setattr(writer_module, "_COMMIT_BYTES", 1)


def parameters(path: Path) -> DatasetParams:
    return DatasetParams(
        name="pets", source="image_folder", path=path, resolution=16, deduplicate=True, max_skipped=0.1
    )


def made(root: Path, per_class: int) -> Path:
    """With unreadable images and equal ones."""
    images = make_images(root, per_class)
    for i in range(5, per_class, 20):
        (images / "cat" / f"{i:03d}.png").write_bytes(b"no image")
        (images / "dog" / f"{i:03d}.png").write_bytes((images / "cat" / f"{i - 5:03d}.png").read_bytes())
    return images


def committed(out: Path) -> int:
    """Images in the part of a store."""
    found = sorted(out.with_name(f".{out.name}.part").glob("progress-????????"))
    return int(found[0].name.removeprefix("progress-")) if found else 0


def killed(function: Callable[[], object], commits: int, seconds: float) -> bool:
    """End it so long after so many commits; False if it finished before."""

    def doomed() -> None:
        left = commits
        commit = writer_module.StoreWriter._commit

        def counted(writer: writer_module.StoreWriter) -> None:
            nonlocal left
            commit(writer)
            left -= 1
            if left == 0:
                signal.setitimer(signal.ITIMER_REAL, seconds)

        # Unhandled, it ends the process at once, wherever it is.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with pytest.MonkeyPatch.context() as context:
            context.setattr(writer_module.StoreWriter, "_commit", counted)
            function()

    return os.waitpid(forked(doomed), 0)[1] == signal.SIGALRM


def finished(function: Callable[[], object]) -> None:
    assert os.waitpid(forked(function), 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small_commits")
def test_kills_at_random_moments_change_nothing(tmp_path: Path, seed: int) -> None:
    params = parameters(made(tmp_path / "pets", 150))
    params = replace(params, encoding=("raw", "png", "jpeg")[seed], shard_gib=(8, 2**-14, 2**-13)[seed])
    draw = random.Random(seed)
    prepare_transform(16)  # Its import costs seconds; processes to come have it from here.
    finished(lambda: prepare(params, tmp_path / "whole" / "store", tmp_path / "whole" / "prepare.json"))

    out, report = tmp_path / "out" / "store", tmp_path / "out" / "prepare.json"
    seen = [0]
    while killed(lambda: prepare(params, out, report), draw.randint(1, 3), draw.uniform(1e-6, 0.01)):
        if out.exists():
            break
        seen.append(committed(out))
    assert seen == sorted(seen), "what is committed is never lost"
    assert len(set(seen)) > 3, "it was killed in the middle"
    finished(lambda: prepare(params, out, report))
    assert contents(out) == contents(tmp_path / "whole" / "store")
    assert report.read_bytes() == (tmp_path / "whole" / "prepare.json").read_bytes()
    assert not out.with_name(".store.part").exists()


def test_what_a_kill_cuts_short_at_the_very_end_is_not_left_in_the_store(tmp_path: Path) -> None:
    params, out = parameters(made(tmp_path / "pets", 10)), tmp_path / "store"

    def ends_before_it_is_in_place() -> None:
        with pytest.MonkeyPatch.context() as context:
            context.setattr(writer_module.StoreWriter, "_publish", lambda self: os.kill(os.getpid(), signal.SIGKILL))
            prepare(params, out)

    assert os.waitpid(forked(ends_before_it_is_in_place), 0)[1] == signal.SIGKILL
    assert not out.exists()
    (tmp_path / ".store.part" / "store" / ".metadata.json.123.part").write_text("{")
    prepare(params, out)
    assert names(out) == ["data-00000.mdb", "digests.bin", "metadata.json"]
    assert names(tmp_path) == [".store.lock", "pets", "store"]


@pytest.mark.slow
def test_a_command_with_workers_that_is_killed_leaves_none_of_them_and_the_next_one_goes_on(tmp_path: Path) -> None:
    picture = encoded(Image.effect_noise((500, 500), 60).convert("RGB"))
    images = make_tar(tmp_path / "images.tar", {f"{i:04d}.png": picture for i in range(1000)})
    params = DatasetParams(source="image_folder", path=images, resolution=64, workers=2, shard_gib=2**-9)
    out = tmp_path / "out" / "store"
    code = (
        "import sys; from pathlib import Path; from dvdp.config import DatasetParams;"
        "from dvdp.data.prepare import prepare;"
        "params = DatasetParams(source='image_folder', path=Path(sys.argv[1]), resolution=64, workers=2,"
        " shard_gib=2**-9); prepare(params, Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(images), str(out)])
    try:
        deadline = time.monotonic() + 240
        while not committed(out):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        with pytest.raises(UserError, match="another preparation"):
            prepare(params, out)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(workers, timeout=30)[1]
    kept = committed(out)
    assert 0 < kept < 1000
    assert not out.exists()
    assert prepare(replace(params, workers=0), out).count == 1000
    prepare(replace(params, workers=0), tmp_path / "whole" / "store")
    assert contents(out) == contents(tmp_path / "whole" / "store")


@pytest.mark.usefixtures("small_commits")
def test_it_goes_on_without_reading_again_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, out = parameters(made(tmp_path / "pets", 40)), tmp_path / "out" / "store"
    loaded = left_in_the_middle(params, out, monkeypatch, images=52)
    kept = committed(out)
    assert kept >= 30
    rest = left_in_the_middle(params, out, monkeypatch, images=1000)
    assert len(loaded) == 53
    assert len(rest) <= 80 - kept
    assert not set(rest) & set(loaded[:kept])
    finished(lambda: prepare(params, tmp_path / "whole" / "store"))
    assert contents(out) == contents(tmp_path / "whole" / "store")


class LeftError(Exception):
    """In the middle."""


def left_in_the_middle(params: DatasetParams, out: Path, patch: pytest.MonkeyPatch, images: int) -> list[str]:
    """Names of the images that were read: so many, and the one at which it was left."""
    loaded: list[str] = []
    read = prepare_module._raw

    def counted(item, index):  # type: ignore[no-untyped-def]
        loaded.append(item.name)
        if len(loaded) > images:
            raise LeftError
        return read(item, index)

    with patch.context() as context:
        context.setattr(prepare_module, "_raw", counted)
        with contextlib.suppress(LeftError):
            prepare(params, out)
    return loaded


@pytest.mark.usefixtures("small_commits")
@pytest.mark.parametrize("change", ["a file", "a file behind a link", "a setting"])
def test_it_starts_afresh_when_source_or_settings_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    images, out = made(tmp_path / "pets", 40), tmp_path / "out" / "store"
    params = parameters(images)
    if change == "a file behind a link":
        (images / "cat").rename(tmp_path / "elsewhere")
        (images / "cat").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "back").symlink_to(images)
    left_in_the_middle(params, out, monkeypatch, images=52)
    assert committed(out)
    if change != "a setting":
        (images / "cat" / "005.png").write_bytes((images / "cat" / "004.png").read_bytes())
    else:
        params = replace(params, resolution=8)
    assert len(left_in_the_middle(params, out, monkeypatch, images=1000)) == 80
    finished(lambda: prepare(params, tmp_path / "whole" / "store"))
    assert contents(out) == contents(tmp_path / "whole" / "store")


@pytest.mark.usefixtures("small_commits")
def test_it_goes_on_when_only_what_does_not_shape_the_store_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, out = replace(parameters(made(tmp_path / "pets", 40)), max_skipped=0.02), tmp_path / "out" / "store"
    with pytest.raises(UserError, match="found 2 unreadable images among 80"):
        prepare(params, out)
    assert committed(out)
    assert len(left_in_the_middle(replace(params, max_skipped=0.1), out, monkeypatch, images=1000)) < 80
    assert ImageStore(out).metadata.skipped == 2


@pytest.mark.usefixtures("small_commits")
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    params, out = parameters(made(tmp_path / "pets", 60)), tmp_path / "out" / "store"
    said = tmp_path / "said.txt"

    def with_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try:
            prepare(params, out)
        except UserError as error:
            said.write_text(str(error))

    finished(with_a_full_disk)
    text = said.read_text()
    assert text.startswith(f"data set: cannot write '{out.with_name('.store.part')}' (")
    assert "bytes free), expected free space on its disk" in text
    assert text.count(". ") == 0
    assert committed(out) > 0
    assert not out.exists()
    finished(lambda: prepare(params, out))
    finished(lambda: prepare(params, tmp_path / "whole" / "store"))
    assert contents(out) == contents(tmp_path / "whole" / "store")
