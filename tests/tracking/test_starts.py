"""What settings start from, as the driver finds it: files that may go, and registered models whose alias may move."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dvdp.config import Params, parse_params
from dvdp.errors import UserError
from dvdp.models.export import load_model
from pipelines.jobs.job import Job
from pipelines.jobs.starts import started
from pipelines.starts import fetch_starts
from pipelines.tracking.champion import CHAMPION
from pipelines.tracking.descriptions import run_description
from pipelines.tracking.registry import register
from pipelines.tracking.runs import TRAINING_HASH, open_run
from tests.logs import hearing
from tests.tracking.support import empty_store, small_model

NAME = "dvdp-digits"


def params(start: str, **setting: Any) -> Params:
    return parse_params(
        {
            "dataset": {"resolution": 8},
            "settings": {
                "dvdp-300": {"process": "dvdp", "turning_points": [300]},
                "own": {"process": "ddpm", **setting},
            },
            "model": {
                "model_channels": 8,
                "channel_mult": [1],
                "attention_factors": [],
                "num_head_channels": 8,
                "num_classes": 0,
            },
            "training": {"start": start},
        }
    )


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An MLflow with two versions, of which the first is champion, in the current folder."""
    monkeypatch.chdir(tmp_path)
    client = empty_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    for seed in (0, 1):
        run = open_run(client, "digits", TRAINING_HASH, f"hash{seed}", f"seed {seed}")
        (tmp_path / str(seed)).mkdir()
        weights = small_model(tmp_path / str(seed) / "weights.safetensors", seed)
        register(run, NAME, weights, {TRAINING_HASH: f"hash{seed}"})
    client.set_registered_model_alias(NAME, CHAMPION, "1")
    return client


def test_a_registered_model_becomes_a_file_and_an_alias_is_followed_once(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = params(f"models:/{NAME}@{CHAMPION}", overrides={"training": {"start": f"models:/{NAME}/2"}})
    found = fetch_starts(asked)
    first, second = (run.training.start for run in found.runs())
    assert [load_model(str(path)).run.seed for path in (first, second)] == [0, 1]
    assert Path(str(first)).is_relative_to(asked.cluster.storage)

    client.set_registered_model_alias(NAME, CHAMPION, "2")
    assert fetch_starts(asked) == found, "what is trained already keeps its name"
    Path(str(first)).unlink()
    assert fetch_starts(asked) == found
    assert load_model(str(first)).run.seed == 0, "of the version that the alias was"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert fetch_starts(asked) == found, "MLflow is not asked again"
    assert fetch_starts(found) == found


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (f"models:/{NAME}", f"found 'models:/{NAME}', expected models:/<name>@<alias> or models:/<name>/<version>"),
        (f"models:/{NAME}/7", f"found no version 'models:/{NAME}/7' in MLflow"),
        (f"models:/{NAME}@best", f"found no version 'models:/{NAME}@best' in MLflow"),
    ],
)
@pytest.mark.usefixtures("client")
def test_an_address_without_a_model_is_one_sentence(address: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        fetch_starts(params(address))
    assert str(caught.value).startswith(f"training.start: {sentence}")


def test_what_was_trained_from_a_file_keeps_its_name_when_the_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = small_model(tmp_path / "w.safetensors")
    asked = params(str(path), overrides={"training": {"start": None}})
    run, scratch = asked.runs()
    there = started(asked, run)
    assert started(asked, scratch) == scratch, "a setting may do without"
    assert there.start is not None
    path.unlink()
    said: list[str] = []
    with hearing(said.append):
        assert started(asked, run) == there
    assert said == [f"dvdp-300: '{path}' is gone; what was trained from it is kept"]
    small_model(path, seed=1)
    other = started(asked, run)
    assert other.start is not None
    assert other.start.sha256 != there.start.sha256, "another file is another training"
    path.unlink()
    assert started(asked, run) == other
    with pytest.raises(UserError, match=r"^training\.start: found no file"):
        started(dataclasses.replace(asked, cluster=dataclasses.replace(asked.cluster, storage=Path("new"))), run)


def test_a_run_says_in_mlflow_what_its_weights_had_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = params(str(small_model(tmp_path / "w.safetensors")))
    job = Job(asked, started(asked, asked.runs()[0]), "digest")
    assert job.run.start is not None
    assert f"had seen {job.run.start.seen}; these are in no other number here." in run_description(job)
    assert json.loads(json.dumps(job.run.describe()))["start"]["sha256"] == job.run.start.sha256
