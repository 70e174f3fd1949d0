"""Scratch projects in which the whole pipeline runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import Project


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with data set, extractor and reference; to be copied, not to be changed."""
    project = Project.create(tmp_path_factory.mktemp("prepared") / "project")
    for stage in ("prepare", "extractor", "reference"):
        project.run("dvdp", stage)
    return project


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Iterator[Callable[..., Project]]:
    """Makes a copy of the prepared project, with changes of its params; what it started is ended with the test."""
    made: list[Project] = []

    def make(**changes: Any) -> Project:
        made.append(prepared.copy(tmp_path / f"project{len(made)}", **changes))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def undisturbed(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose settings were trained in peace, on one rank; to be read, not to be changed."""
    project = prepared.copy(tmp_path_factory.mktemp("undisturbed") / "project")
    project.train_in_peace("ddpm", "dvdp-600")
    return project


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after its first `dvc repro`, committed; to be copied, not to be changed."""
    project = Project.create(tmp_path_factory.mktemp("reproduced") / "project", training={"images": 1600})
    project.run("dvc", "repro")
    project.commit()
    return project
