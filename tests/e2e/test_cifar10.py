"""CIFAR-10 as a tree of images in a tar, through the whole pipeline, with its preset cut short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from dvdp.config import read_params
from tests.e2e.support import SOURCES, Project, merged

ARCHIVE = "cifar10-images.tar.xz"
#: 10,000 images, and seconds of everything else.
SHORT = {
    "training": {
        "images": 960,
        "warmup_images": 160,
        "log_images": 320,
        "checkpoint_images": 640,
        "preview_images": 960,
        "preview_count": 4,
        "preview_steps": 4,
    },
    "sampling": {"count": 64, "steps": 6},
    "evaluation": {"samples": 64, "kid_subset": 32, "extractor_epochs": 1},
    "cluster": {"threads": 1},
}


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.skipif("DVDP_TEST_DATA" not in os.environ, reason=f"DVDP_TEST_DATA names no folder with {ARCHIVE}")
def test_cifar10_as_an_image_folder_runs_through_the_whole_pipeline(tmp_path: Path) -> None:
    archive = Path(os.environ["DVDP_TEST_DATA"]) / ARCHIVE
    if not archive.exists():
        pytest.skip(f"DVDP_TEST_DATA has no {ARCHIVE}")
    preset = yaml.safe_load((SOURCES / "presets" / "cifar10-small.yaml").read_text())
    path = {"dataset": {"path": str(archive / "cifar10-images" / "test")}}
    here = Project.create(tmp_path / "project")
    (here.folder / "params.yaml").write_text(yaml.safe_dump(merged(merged(preset, SHORT), path), sort_keys=False))

    for stage in (["prepare"], ["extractor"], ["reference"], ["experiment", "--reports", "reports"]):
        here.run("dvdp", *stage)
    prepared = json.loads((here.folder / "data" / "cifar10-images" / "prepare.json").read_text())
    assert prepared["count"] == 10_000
    assert {entry["images"] for entry in prepared["labels"]} == {1000}
    metrics = json.loads((here.folder / "reports" / "metrics.json").read_text())
    assert set(metrics) == set(read_params(here.folder / "params.yaml").settings)
    assert all("fd_labels" in values and "fid" not in values for values in metrics.values())
    assert "DVDP on cifar10-images" in (here.folder / "reports" / "index.html").read_text()
