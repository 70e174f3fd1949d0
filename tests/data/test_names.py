"""Names of files and folders are bytes: whatever they are, the set is prepared and its labels stay apart."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from dvdp.config import DatasetParams, parse_params
from dvdp.data.prepare import prepare
from dvdp.data.store import METADATA, ImageStore
from dvdp.errors import UserError
from pipelines.stages import data_sheet, describe_data
from tests.data.support import make_tar, make_zip, png

#: Names of class folders, as bytes, in their order, and the labels they become.
NAMES = {
    b" dog": r"\u0020dog",
    b"$\\alpha$|*_`": r"$\\alpha$|*_`",
    b"-S": "-S",
    b"7": "7",
    b"<script>alert(1)<": "<script>alert(1)<",
    b"a\nb\x1b[31m": r"a\u000ab\u001b[31m",
    b"caf\xc3\xa9": "café",
    b"caf\xe9": r"caf\xe9",
    b"dog": "dog",
    b"long" + b"x" * 250: rf"long{'x' * 78}\~{hashlib.sha256(b'long' + b'x' * 250).hexdigest()[:16]}",
    b"x\xe2\x80\xaegpj": r"x\u202egpj",
    b"~": "~",
}


def odd_folders(root: Path) -> Path:
    for i, name in enumerate(NAMES):
        folder = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        folder.mkdir(parents=True)
        (folder / os.fsdecode(b"\xff\n.png")).write_bytes(png(i * 10))
    (root / "dog" / os.fsdecode(b"broken\xe9|.png")).write_bytes(b"no image")
    return root


def test_odd_names_of_folders_and_files_go_through_store_report_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = {"name": "odd", "source": "image_folder", "path": str(odd_folders(tmp_path / "in")), "max_skipped": 0.5}
    params = parse_params({"dataset": dataset})
    store = tmp_path / "data" / "odd" / "store"
    metadata = prepare(params.dataset, store, tmp_path / "prepare.json")
    assert list(metadata.labels) == list(NAMES.values())
    assert metadata.label_counts == (1,) * len(NAMES) + (0,)
    for file in (tmp_path / "prepare.json", store / METADATA):
        json.loads(file.read_bytes().decode())
    found = json.loads((tmp_path / "prepare.json").read_text("utf-8"))
    assert [entry["label"] for entry in found["labels"]] == list(NAMES.values())
    assert found["skipped_images"] == {r"dog/broken\xe9|.png": "no image in a known format"}
    # Each label is that of its own folder's image.
    records = map(ImageStore(store).__getitem__, range(len(NAMES)))
    of_red = {int(image[0].mean().round()): metadata.labels[label] for image, label in records}
    assert [of_red[i * 10] for i in range(len(NAMES))] == list(NAMES.values())
    text = describe_data(params)
    text.encode()
    assert all(f"{label} 1" in text for label in NAMES.values())
    assert all(line.isprintable() for line in text.splitlines())
    assert data_sheet(params, tmp_path / "sheet.png").is_file()


def labels_of(path: Path, out: Path) -> tuple[str, ...]:
    return prepare(DatasetParams(source="image_folder", path=path, resolution=4), out).labels


def test_names_in_archives_may_be_of_any_encoding_and_length(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    files = {f"{latin}/a.png": png(), "café/a.png": png(), f"{'y' * 3000}/a.png": png(), "a|\n<b>/a.png": png()}
    pax, gnu = make_tar(tmp_path / "pax.tar", files), tmp_path / "gnu.tar"
    with tarfile.open(gnu, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for path in (pax, gnu):
        *short, long = labels_of(path, tmp_path / path.stem)
        assert short == [r"a|\u000a<b>", "café", r"caf\xe9"]
        assert (len(long), long[:82]) == (100, "y" * 82)


def test_names_in_a_zip_without_the_mark_of_utf_8_are_utf_8_or_of_code_page_437(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"été/a.png": png(), "\u202e/b.png": png()})
    assert labels_of(path, tmp_path / "marked") == ("été", r"\u202e")
    content = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        for place in (i for i in range(len(content)) if content.startswith(header, i)):
            content[place + flags] &= ~8
    path.write_bytes(content)
    assert labels_of(path, tmp_path / "utf-8") == ("été", r"\u202e")
    path.write_bytes(
        content.replace("été".encode(), "été".encode("cp437") + b"ab").replace(b"\xe2\x80\xae", b"\xff\x80x")
    )
    assert labels_of(path, tmp_path / "cp437") == (r"\u00a0Çx", "étéab")


def test_paths_that_cannot_be_opened_are_one_sentence(tmp_path: Path) -> None:
    for path in ("x" * 300, "a/" * 499):
        with pytest.raises(UserError, match=r"^dataset\.path: ") as error:
            prepare(DatasetParams(source="image_folder", path=path), tmp_path / "store")
        assert str(error.value).isprintable()
    with pytest.raises(UserError, match=r"^path: found '.*', expected a path without control characters") as error:
        DatasetParams(source="image_folder", path=os.fsdecode(b"no\xe9\n"))
    assert str(error.value).isprintable()
