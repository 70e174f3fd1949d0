"""Labels are those of the folders or of files beside the images, as params say; files are read or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dvdp.config import DatasetParams, parse_params
from dvdp.data.prepare import prepare
from dvdp.data.sources import ImageFolder
from dvdp.data.sources.image_folder import LabelsFrom
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from tests.data.support import make_tar, make_tree, make_zip, png

SHARDS = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"]


def labelled(path: Path, labels_from: LabelsFrom = "auto") -> list[str | None]:
    source = ImageFolder(path, labels_from)
    found = [item.label for item in source]
    assert set(source.labels) == set(found) - {None}
    return found


def fails(path: Path, labels_from: LabelsFrom = "auto") -> str:
    with pytest.raises(UserError, match=r"^dataset\.labels: .* dataset\.labels to folders or none\.$") as error:
        ImageFolder(path, labels_from)
    return str(error.value).removeprefix("dataset.labels: ").removesuffix(", or set dataset.labels to folders or none.")


def dataset_tool(**labels: int) -> bytes:
    return json.dumps({"labels": list(labels.items())}).encode()


def with_file(root: Path, names: list[str], file: str, content: str | bytes) -> Path:
    make_tree(root, names)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# Folders


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        # Splits are no classes, and the classes of splits are one.
        (["train/cat/a.png", "val/cat/b.png", "val/dog/c.png"], ["cat", "cat", "dog"]),
        (["Train/x/cat/a.png", "Test/x/cat/b.png", "Test/x/dog/c.png"], ["cat", "cat", "dog"]),
        (["train/a.png", "test/b.png"], [None, None]),
        (["train/a.png", "car/b.png"], ["train", "car"]),
        # Equal names elsewhere are not one class.
        (["a/cat/a.png", "a/dog/c.png", "b/cat/b.png"], ["a/cat", "dog", "b/cat"]),
        (["train/a/cat/a.png", "train/b/cat/b.png", "val/a/cat/c.png"], ["a/cat", "b/cat", "a/cat"]),
        (["set/a/cat/a.png", "set/cat/b.png"], ["a/cat", "cat"]),
        (["cat/a.png", "cat/b/cat/c.png"], [None, "cat"]),
    ],
)
def test_splits_are_no_classes_and_equal_names_elsewhere_are_several(
    tmp_path: Path, names: list[str], labels: list[str | None]
) -> None:
    path = make_tar(tmp_path / "x.tar", {name: png() for name in names})
    found = {item.name: item.label for item in ImageFolder(path)}
    assert [found[name] for name in names] == labels


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["00000", "00001"], False),
        (["00000", "00001", "00002", "00003", "00004", "00005"], False),
        (["00000", "01000", "02000"], False),
        (["00007", "00008"], False),
        (["shard-0", "shard-17"], False),
        (["part_00", "part_01"], False),
        (["00000", "00045", "00099"], True),
        (["0000045", "0000099"], True),
        (["0", "1", "2"], True),
        (["000", "001"], True),
        (["n01440764", "n01443537"], True),
        (["00000", "cat"], True),
    ],
)
def test_numbered_parts_are_no_classes_unless_params_say_so(tmp_path: Path, folders: list[str], classes: bool) -> None:
    make_tree(tmp_path, [f"{folder}/x.png" for folder in folders])
    assert labelled(tmp_path) == (folders if classes else [None] * len(folders))
    assert labelled(tmp_path, "folders") == folders
    assert labelled(tmp_path, "none") == [None] * len(folders)
    remarks = ImageFolder(tmp_path).remarks
    assert bool(remarks) == (not classes or folders == ["000", "001"] or folders[0] == "0000045" or "00099" in folders)
    assert ImageFolder(tmp_path, "folders").remarks == ImageFolder(tmp_path, "none").remarks == ()


def test_parts_within_classes_leave_the_classes(tmp_path: Path) -> None:
    names = [f"{kind}/{part}/{kind}.png" for kind in ("cat", "dog") for part in ("00000", "00001")]
    assert labelled(make_tree(tmp_path, names)) == ["cat", "cat", "dog", "dog"]


def test_what_was_decided_about_folders_is_said(tmp_path: Path) -> None:
    names = ["train/a/cat/a.png", "train/b/cat/b.png", "test/a/cat/c.png"]
    assert ImageFolder(make_tree(tmp_path / "one", names)).remarks == (
        "the folders test, train are splits and no classes.",
        "folders of one name in several places are classes of their own: a/cat, b/cat.",
    )
    names = [f"{i:05d}/x.png" for i in range(7)]
    assert ImageFolder(make_tree(tmp_path / "two", names)).remarks == (
        "the numbered folders 00000, 00001, 00002, 00003, 00004, .. (7) are parts of the data set and no classes; if"
        " they are, set dataset.labels to folders.",
    )
    assert ImageFolder(make_tree(tmp_path / "three", ["cat/a.png", "dog/b.png"])).remarks == ()


# Files


def test_the_labels_of_dataset_tool_are_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    labels = dict(zip(SHARDS, (10, 2, 10), strict=True))
    tree = with_file(tmp_path / "tree", SHARDS, "dataset.json", dataset_tool(**labels))
    files = {"dataset.json": dataset_tool(**labels), **{name: png() for name in SHARDS}}
    for path in (tree, make_zip(tmp_path / "x.zip", files), make_tar(tmp_path / "x.tar.gz", files, "w:gz")):
        for labels_from in ("auto", "file"):
            source = ImageFolder(path, labels_from)
            assert source.labels == ("2", "10")
            assert [item.label for item in source] == ["10", "2", "10"]
            assert source.remarks == ("the labels are those of 'dataset.json'.",)
            assert source.left_out.counts == {"file of labels": 1}
        assert labelled(path, "folders") == ["00000", "00000", "00001"]
        assert labelled(path, "none") == [None] * 3


def test_dataset_tool_may_say_that_there_are_no_labels(tmp_path: Path) -> None:
    tree = with_file(tmp_path, ["cat/a.png", "dog/b.png"], "dataset.json", '{"labels": null}')
    assert labelled(tree) == [None, None]
    assert ImageFolder(tree).remarks == ("'dataset.json' says that there are no labels.",)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1, "x": []}\n\n{"file_name": "./sub/b.png", "label": 0}\n'),
        ("metadata.jsonl", '{"label": "1", "file_name": "a.png"}\n{"file_name": "sub/b.png", "label": "0"}'),
        ("metadata.csv", "file_name,label\na.png,1\nsub/b.png,0\n"),
        ("labels.CSV", "\ufeffID;Label;Filename\r\n7;1;a.png\r\n8;0;sub\\b.png\r\n"),
        ("labels.tsv", 'image\tclass\n"a.png"\t1\nsub/b.png\t 0 \n'),
        ("labels.csv", "filename,label\na.png,1\nsub/b.png,0\n".encode("utf-16")),
        ("deep/er/labels.csv", "path,target\na.png,1\nsub/b.png,0\n"),
        ("sub/labels.csv", "path,target\na.png,1\nb.png,0\n"),
        ("meta/labels.csv", "path,target\n../a.png,1\n../sub/b.png,0\n"),
        ("x.jsonl", '{"image": "a.png", "label": 1, "text": "\u2028"}\r\n{"image": "sub/b.png", "label": 0}\r\n'),
    ],
)
def test_tables_of_files_and_labels_are_read(tmp_path: Path, file: str, content: str | bytes) -> None:
    tree = with_file(tmp_path, ["a.png", "sub/b.png"], file, content)
    assert labelled(tree) == labelled(tree, "file") == ["1", "0"]
    assert ImageFolder(tree).labels == ("0", "1")


def test_ids_without_a_suffix_are_files(tmp_path: Path) -> None:
    tree = with_file(tmp_path / "a", ["a.png", "sub/b.x.jpg"], "labels.csv", "id,breed,label\na,x,1\nsub/b.x,y,0\n")
    assert labelled(tree) == ["1", "0"]
    ambiguous = with_file(tmp_path / "b", ["a.png", "a.jpg"], "labels.csv", "image_id,label\na,1\n")
    assert fails(ambiguous).startswith("'labels.csv' names 1 images that are not there or are left out, 'a' first")


def test_accents_may_be_composed_or_not(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    tree = with_file(tmp_path / "a", [f"{apart}.png"], "labels.csv", f"file,label\n{composed}.png,{apart}\n")
    assert labelled(tree) == [composed]
    names = [f"train/{apart}/a.png", "train/dog/b.png", f"val/{composed}/c.png"]
    assert labelled(make_tree(tmp_path / "b", names)) == [composed, "dog", composed]


def test_each_split_may_have_a_table_of_its_own(tmp_path: Path) -> None:
    names = ["train/a.png", "train/b.png", "val/a.png"]
    with_file(tmp_path, names, "train/metadata.csv", "file_name,label\na.png,cat\nb.png,dog\n")
    with_file(tmp_path, [], "val/metadata.csv", "file_name,label\na.png,dog\n")
    assert labelled(tmp_path) == ["cat", "dog", "dog"]
    assert ImageFolder(tmp_path).labels == ("cat", "dog")


def test_names_in_tables_are_bytes_too(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with_file(tmp_path, [name], "labels.csv", b"file,label\ncaf\xe9.png,\xe9t\xe9\n")
    params = DatasetParams(source="image_folder", path=tmp_path, resolution=4)
    assert prepare(params, tmp_path.parent / "store").labels == (r"\xe9t\xe9",)


def test_classes_of_webdataset_are_read(tmp_path: Path) -> None:
    files = {}
    for i, label in enumerate(("10", "9\n", " 10 ")):
        files |= {f"{i:03d}.cls": label.encode(), f"{i:03d}.jpg": png(), f"{i:03d}.json": b"{}"}
    for path in (make_tar(tmp_path / "x.tar", files), make_zip(tmp_path / "x.zip", files)):
        source = ImageFolder(path)
        assert source.labels == ("9", "10")
        assert [item.label for item in source] == ["10", "9", "10"]
    files = {"a.input.png": png(), "a.cls": b"cat", "b.v1.png": png(), "b.v1.cls": b"dog"}
    assert labelled(make_tar(tmp_path / "y.tar", files)) == ["cat", "dog"]
    assert fails(make_tar(tmp_path / "z.tar", {**files, "c.cls": b"cow"})).startswith(
        "'c.cls' names 1 images that are not"
    )
    del files["a.cls"]
    assert "no label of 1 of 2 images in 'b.v1.cls', 'a.input.png' first" in fails(make_tar(tmp_path / "v.tar", files))


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("dataset.json", '{"labels": [["a.png", 1]', "'dataset.json' is no JSON"),
        ("dataset.json", '{"labels": [["a.png", [0.5, 1]], ["b.png", 1]]}', "'dataset.json', 'a.png', has [0.5, 1] as"),
        ("dataset.json", '{"labels": [1, 2]}', "'dataset.json' has [1, 2] as 'labels', expected [["),
        ("dataset.json", '{"labels": [["a.png", 1], ["b.png", "x"]]}', "numbers and names of classes, such as 1"),
        ("dataset.json", '{"labels": [["a.png", 1], ["b.png", -1]]}', "has -1 as a label"),
        ("dataset.json", '{"labels": [["a.png", true], ["b.png", 1]]}', "has true as a label"),
        ("dataset.json", '{"labels": [["a.png", 1]]}', "no label of 1 of 2 images in 'dataset.json', 'b.png' first"),
        ("dataset.json", '{"labels": [["a.png", 1], ["c.png", 1]]}', "names 1 images that are not there"),
        ("dataset.json", '{"labels": [["a.png", 1], ["/etc/b.png", 1], ["../b.png", 1]]}', "names 2 images"),
        ("labels.csv", "file,label\na.png,1\nb.png,\n", "'labels.csv', line 3, has \"\" as a label"),
        ("labels.csv", "file,label\na.png,1\nb.png\n", "'labels.csv', line 3, has nothing as a label"),
        ("labels.csv", "file,label\n,1\n", "has no 'file' in line 2"),
        ("labels.csv", "file,label\na.png,1\na.png,2\nb.png,1\n", "says that 'a.png' is of class '2', expected '1'"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n{"file', "'metadata.jsonl', line 2, is no JSON"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name": "b.png", "label": 1}', "has nothing as a label"),
        ("dataset.json", '{"labels": {"a.png": 1}}', "as 'labels', expected [["),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n3', "has 3 in line 2, expected an object"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": [1, 2]}', "line 1, has [1, 2] as a label"),
        ("metadata.parquet", "PAR1", "'metadata.parquet' is a Parquet file"),
        ("a.cls", "", "'a.cls' has \"\" as a label"),
        ("a.cls", "1\n2", "'a.cls' has \"1\\n2\" as a label"),
        ("a.cls", "1", "no label of 1 of 2 images in 'a.cls', 'b.png' first"),
    ],
)  # fmt: skip
def test_a_file_of_labels_that_does_not_fit_is_one_sentence(tmp_path: Path, file: str, content: str, text: str) -> None:
    tree = with_file(tmp_path, ["a.png", "b.png"], file, content)
    assert text in fails(tree)
    assert text in fails(tree, "file")
    assert labelled(tree, "folders") == labelled(tree, "none") == [None, None]


def test_files_that_are_not_about_labels_are_named_and_not_read(tmp_path: Path) -> None:
    with_file(tmp_path, ["cat/a.png", "dog/b.png"], "metadata.csv", "file_name,text\ncat/a.png,a cat\n")
    with_file(tmp_path, [], "dataset.json", "{}")
    assert labelled(tmp_path) == ["cat", "dog"]
    assert ImageFolder(tmp_path).remarks == (
        "'dataset.json' has no key 'labels', and is not read as a file of labels.",
        "'metadata.csv' has the columns file_name, text, none of files and one of labels, and is not read as a file of"
        " labels.",
    )
    assert fails(tmp_path, "file").startswith("found no file of labels in ")


def test_a_file_of_labels_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (make_tree(tmp_path, ["a.png"]) / "dataset.json").symlink_to("gone.json")
    assert fails(tmp_path).startswith("cannot read 'dataset.json' (No such file or directory)")
    assert labelled(tmp_path, "none") == [None]


def test_hidden_files_of_labels_are_no_part_of_a_source(tmp_path: Path) -> None:
    with_file(tmp_path, ["cat/a.png", "dog/b.png"], ".cache/dataset.json", "{")
    assert labelled(tmp_path) == ["cat", "dog"]


# Params, store and report


def test_labels_are_part_of_the_store_and_what_was_decided_stands_in_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = with_file(
        tmp_path / "in", SHARDS, "dataset.json", dataset_tool(**dict.fromkeys(SHARDS[1:], 1), **{SHARDS[0]: 0})
    )
    digests = set()
    for labels, names in (("auto", ("0", "1")), ("none", ()), ("folders", ("00000", "00001"))):
        params = DatasetParams(source="image_folder", path=tree, resolution=4, labels=labels)
        metadata = prepare(params, tmp_path / labels, tmp_path / "prepare.json")
        assert metadata.labels == names
        digests.add(metadata.digest)
        remarks = json.loads((tmp_path / "prepare.json").read_text())["remarks"]
        assert remarks == (["labels: the labels are those of 'dataset.json'."] if labels == "auto" else [])
    assert len(digests) == 3
    assert [ImageStore(tmp_path / "auto")[i][1] for i in range(3)] == [0, 1, 1]


def test_any_source_can_be_read_without_its_labels(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x03" + bytes(3072) + b"\x05" + bytes(3072))
    for labels, counts in (("auto", (0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0)), ("none", (2,))):
        params = DatasetParams(source="cifar10", path=tmp_path, resolution=4, labels=labels)
        assert prepare(params, tmp_path / labels).label_counts == counts


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ({"labels": "files", "source": "image_folder", "path": "x"}, "found 'files' (did you mean 'file'?)"),
        ({"labels": "file"}, "found 'file' beside source 'digits', expected auto or none"),
        ({"labels": None}, "found None, expected"),
    ],
)
def test_labels_in_params_are_checked(dataset: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_params({"dataset": dataset})
    assert str(error.value).startswith(f"params: dataset.labels: {text}")


def test_images_that_go_while_a_source_is_read_take_no_other_labels_with_them(tmp_path: Path) -> None:
    source = ImageFolder(make_tree(tmp_path, ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"]))
    (tmp_path / "cat" / "b.png").unlink()
    (tmp_path / "dog" / "c.png").unlink()
    assert [(item.name, item.label) for item in source] == [("cat/a.png", "cat"), ("dog/d.png", "dog")]


def test_images_that_come_while_a_source_is_read_are_one_sentence(tmp_path: Path) -> None:
    source = ImageFolder(make_tree(tmp_path, ["b.png", "c.png"]))
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(UserError, match=r"^dataset\.path: found 'a\.png' .*, which was not there"):
        list(source)
