"""Scheduled flows do something where something changed, and say so where nothing did."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest
import yaml

from dvdp.config import read_params
from dvdp.errors import UserError
from pipelines import schedules
from pipelines.schedules import clean_up, refresh
from pipelines.stages import prepare_data
from tests.data.support import make_images


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with images of its own."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "pets", 3)
    dataset = {"name": "pets", "source": "image_folder", "path": "pets", "resolution": 16}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
    return tmp_path


def test_refresh_trains_where_images_changed_and_else_says_that_nothing_did(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []
    broken = False

    def dvc(*arguments: str) -> None:
        calls.append(arguments)
        if "prepare" in arguments and "repro" in arguments:
            shutil.rmtree(project / "data", ignore_errors=True)
            prepare_data(read_params())
        elif broken:
            raise UserError("dvc repro: found exit status 1")

    def said() -> tuple[str, list[str]]:
        calls.clear()
        state = refresh.fn()
        assert state.is_completed()
        return str(state.message), [call[-1] for call in calls]

    monkeypatch.setattr(schedules, "_dvc", dvc)
    prepare_data(read_params())
    assert said() == ("Nothing new: files at pets have changed, and the images have not.", ["prepare"])
    assert said() == ("Nothing new: no file at pets has changed.", [])

    (image,) = project.glob("pets/cat/000.png")
    os.utime(image, (0, 0))
    assert said() == ("Nothing new: files at pets have changed, and the images have not.", ["prepare"])

    shutil.copyfile(image, image.with_name("new.png"))
    broken = True
    for _ in range(2):  # Training that failed is begun again.
        with pytest.raises(UserError, match="exit status 1"):
            said()
        assert calls == [("repro", "--force", "--single-item", "prepare"), ("repro",)]
    broken = False
    text, done = said()
    assert text.startswith("New images: digest ")
    assert done == ["prepare", "repro"]
    assert said() == ("Nothing new: no file at pets has changed.", [])


def test_a_source_without_files_has_nothing_new(project: Path) -> None:
    (project / "params.yaml").write_text("dataset: {source: digits}")
    assert refresh.fn().message == "Nothing new: source digits has no files that could change."


def test_a_refresh_that_cannot_prepare_brings_the_data_back(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def dvc(*arguments: str) -> None:
        calls.append(arguments)
        if "--force" in arguments:
            raise UserError("dvc repro: found exit status 1")

    monkeypatch.setattr(schedules, "_dvc", dvc)
    with pytest.raises(UserError, match="exit status 1"):
        refresh.fn()
    assert calls[-1] == ("checkout", "prepare")


def test_dvc_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schedules._dvc("--version")
    with pytest.raises(
        UserError, match=r"^dvc repro: found exit status \d+, expected 0; it said: .*not inside of a DVC"
    ):
        schedules._dvc("repro")


def test_clean_lists_what_may_go(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(schedules, "create_markdown_artifact", lambda text, **_: shown.append(text))
    state = clean_up.fn()
    assert state.is_completed()
    assert str(state.message).endswith("nothing was removed yet, the same command with --yes does it.")
    assert str(state.message) in shown[0]


def test_every_deployment_gives_its_flow_parameters_that_it_has() -> None:
    # As Prefect reads it: YAML 1.1, where a key such as "yes" is no text.
    deployments = yaml.safe_load((Path(__file__).parents[1] / "prefect.yaml").read_text())["deployments"]
    assert {each["name"] for each in deployments} == {"experiment", "refresh", "re-evaluate", "generate", "clean"}
    for each in deployments:
        module, name = each["entrypoint"].removesuffix(".py").replace("/", ".").replace(".py:", ":").split(":")
        flow = getattr(importlib.import_module(module), name)
        assert set(each["parameters"]) <= set(flow.parameters.properties), each["name"]
