"""``dvdp evaluate`` on what is there: nothing is made twice, and nothing that MLflow knows is replaced."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from dvdp.config import read_params
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.evaluation.records import ScoreRecord
from dvdp.models.export import load_model
from pipelines.cli import main
from pipelines.commands import runs
from pipelines.commands.evaluate import RegisteredModel, add_evaluation, registered_model
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.sample import Sampler, missing_shards
from pipelines.stages import make_extractor, make_references, prepare_data
from pipelines.tracking.registry import WEIGHTS_DIGEST, register
from pipelines.tracking.runs import DATASET_DIGEST, EVALUATION_OF, SAMPLING_HASH, TRAINING_HASH, open_run, read_text
from tests.tracking.support import empty_store, small_model

NAME = "dvdp-digits"
ADDRESS = f"models:/{NAME}/1"
TREE: dict[str, Any] = {
    "dataset": {"name": "digits", "resolution": 8},
    "settings": {"dvdp-300": {"process": "dvdp", "turning_points": [300]}},
    "model": {
        "model_channels": 8,
        "channel_mult": [1],
        "attention_factors": [],
        "num_head_channels": 8,
        "num_classes": 0,
    },
    "training": {"preview_steps": 4},
    "cluster": {"threads": 1},
    "sampling": {"steps": 4, "count": 12, "seed": 3},
    "evaluation": {"samples": 12, "kid_subset": 4, "extractor_epochs": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with its extractor and its reference."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("params.yaml").write_text(yaml.safe_dump(TREE))
        for stage in (prepare_data, make_extractor, make_references):
            stage(read_params())
    return folder / "data"


@pytest.fixture
def client(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An MLflow that knows one trained run, its score and its model; the current folder has params and data."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(TREE))
    Path("data").symlink_to(data)
    client = empty_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    run = open_run(client, "dvdp", SAMPLING_HASH, "sampled", "dvdp-300")
    run.set_metrics({"fd_labels": 5.0}, step=100)
    run.set_status("FINISHED")
    digest = ImageStore(DataPaths.of(read_params()).store).metadata.digest
    tags = {TRAINING_HASH: "trained", DATASET_DIGEST: digest}
    register(run, NAME, small_model(tmp_path / "weights.safetensors"), tags)
    return client


def write_params(**changes: Any) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({**TREE, **changes}))


def sampled() -> RegisteredModel:
    """The registered model, its images drawn as a worker of the cluster draws them."""
    model = registered_model(read_params(), ADDRESS)
    sampler = Sampler(str(model.weights), str(model.samples), model.run.sampling, 1, "cpu")
    for shard in missing_shards(model):
        sampler(*shard)()
    return model


def test_images_of_a_model_are_files_that_are_written_once(client: MlflowClient, tmp_path: Path) -> None:
    model, out = sampled(), tmp_path / "images"
    runs.check_same(out, model)
    runs.write_images(model.samples, out, model)
    before = files(out)
    assert len(before) == 12 + 1
    drawn = load_model("weights.safetensors", sampling=model.run.sampling).sample(12).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))], drawn)
    (out / "00000007.png").unlink()
    runs.check_same(out, model)
    runs.write_images(model.samples, out, model)
    now = files(out)
    changed = {path.name for path in now if now[path] != before[path]}
    assert changed <= {"00000007.png", "images.json"}
    write_params(sampling={**TREE["sampling"], "seed": 4})
    with pytest.raises(UserError, match=r"^--out: found other files in '.*images', expected an empty folder"):
        runs.check_same(out, registered_model(read_params(), ADDRESS))


def evaluations(client: MlflowClient) -> list[Any]:
    """The runs beneath the trained one, the oldest first."""
    (parent,) = client.search_runs(["1"], f"tags.`{SAMPLING_HASH}` = 'sampled'")
    query = f"tags.`{EVALUATION_OF}` = '{parent.info.run_id}'"
    found = client.search_runs(["1"], query, order_by=["attributes.start_time ASC"])
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in found)
    assert all((run.info.run_name, run.info.status) == ("evaluation", "FINISHED") for run in found)
    return list(found)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_registered_model_is_scored_once_and_added_beneath_the_run_it_came_from(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sampled()
    drawn = load_model("weights.safetensors", sampling=model.run.sampling).sample(12)
    np.testing.assert_array_equal(np.load(model.samples / "00000000.npy"), drawn.numpy())
    assert main(["evaluate", "--model", ADDRESS]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{NAME} version 1: fd_labels ")
    assert "Note: 12 samples are fewer than the extractor's 64 features" in printed
    (child,) = evaluations(client)
    record = ScoreRecord.from_json(read_text(client, child.info.run_id, "score.json") or "")
    assert child.data.metrics == record.metrics
    assert child.data.params["sampling.steps"] == "4"
    assert (record.samples, record.sampling["seed"]) == (12, 3)

    before = files(Path("runs"))
    assert main(["evaluate", "--model", ADDRESS]) == 0
    assert capsys.readouterr().out == printed
    assert files(Path("runs")) == before
    (again,) = evaluations(client)
    assert (again.info.run_id, again.info.end_time) == (child.info.run_id, child.info.end_time)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_sampler_adds_a_second_evaluation_and_leaves_the_first_and_the_run_alone(client: MlflowClient) -> None:
    sampled()
    assert main(["evaluate", "--model", ADDRESS]) == 0
    (first,) = evaluations(client)
    write_params(sampling={**TREE["sampling"], "steps": 6})
    other = sampled()
    assert main(["evaluate", "--model", ADDRESS]) == 0
    both = evaluations(client)
    assert [run.data.params["sampling.steps"] for run in both] == ["4", "6"]
    assert both[0].data.metrics == first.data.metrics
    assert len(list(other.samples.parent.iterdir())) == len(list(other.folder.glob("scores/*.json"))) == 2
    (parent,) = client.search_runs(["1"], f"tags.`{SAMPLING_HASH}` = 'sampled'")
    assert parent.data.metrics == {"fd_labels": 5.0}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_likelihood_asked_for_afterwards_is_all_that_is_made(client: MlflowClient) -> None:
    sampled()
    assert main(["evaluate", "--model", ADDRESS]) == 0
    before = files(Path("runs"))
    write_params(evaluation={**TREE["evaluation"], "likelihood": 4})
    assert main(["evaluate", "--model", ADDRESS]) == 0
    (made,) = set(files(Path("runs"))) - set(before)
    assert made.parent.name == "likelihoods"
    assert {path: time for path, time in files(Path("runs")).items() if path != made} == before
    first, second = evaluations(client)
    more = json.loads(made.read_text())
    assert more["bits_per_dim_images"] == 4
    assert second.data.metrics == pytest.approx({**first.data.metrics, **more})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_published_statistics_are_a_score_of_their_own_beside_that_against_the_reference(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled()
    assert main(["reference", "--export", "published.npz"]) == 0
    assert main(["evaluate", "--model", ADDRESS]) == 0
    capsys.readouterr()
    for _ in range(2):
        assert main(["evaluate", "--model", ADDRESS, "--statistics", "published.npz"]) == 0
        assert "does not say how its images were cropped" in capsys.readouterr().out
    against_data, against_file = evaluations(client)
    assert set(against_file.data.metrics) == {"fd_labels", "fd_labels_error"}
    assert against_file.data.metrics["fd_labels"] == pytest.approx(against_data.data.metrics["fd_labels"], rel=1e-9)
    assert against_file.data.params["reference_digest"].startswith("npz ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_worker_with_a_gpu_of_rays_scores_as_this_process_does(
    client: MlflowClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of the reference, images and scores: each by a worker, which Ray has given the only GPU."""
    sampled()
    assert main(["evaluate", "--model", ADDRESS]) == 0
    expected, (here,) = capsys.readouterr().out, Path("runs").glob("models/*/scores/*.json")
    record, nearest = here.read_text(), here.with_name(f"{here.stem}.nearest.csv").read_text()

    features = Path("data/digits/reference/features.safetensors")
    known = features.read_bytes()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
    for module in ("pipelines.jobs.device", "pipelines.jobs.score", "pipelines.jobs.sample"):
        monkeypatch.setattr(f"{module}.worker_device", lambda _: "cpu")
    write_params(cluster={"threads": 1, "gpu": True, "busy": "share", "storage": "others"})
    assert main(["reference"]) == 0
    assert features.read_bytes() == known
    capsys.readouterr()
    assert main(["evaluate", "--model", ADDRESS]) == 0
    assert capsys.readouterr().out == expected
    (there,) = Path("others").glob("models/*/scores/*.json")
    assert there.read_text() == record
    assert there.with_name(f"{there.stem}.nearest.csv").read_text() == nearest


def test_a_record_that_is_the_runs_own_is_not_added(client: MlflowClient) -> None:
    record = ScoreRecord({"fd_labels": 5.0}, "labels", "e", 12, 1797, "d", "none", 8, 4, "torch-fidelity")
    run = open_run(client, "dvdp", SAMPLING_HASH, "sampled", "dvdp-300")
    run.log_json("score.json", json.loads(record.to_json()))
    add_evaluation(run, record, 100)
    assert evaluations(client) == []
    add_evaluation(run, dataclasses.replace(record, samples=13), 100)
    assert [child.data.params["samples"] for child in evaluations(client)] == ["13"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_of_other_data_is_scored_with_a_remark(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.set_model_version_tag(NAME, "1", DATASET_DIGEST, "another")
    sampled()
    assert main(["evaluate", "--model", ADDRESS]) == 0
    assert f"Note: {NAME} version 1 was trained on another data set" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(".")
    return line.removeprefix("dvdp: ")


def test_versions_that_are_not_there_or_do_not_fit_are_one_sentence(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for address in ("dvdp-digits@champion", "models:/dvdp-digits", "models:/dvdp-digits/latest"):
        assert refused(capsys, "--model", address).startswith(f"--model: found '{address}', expected models:/<name>@")
    for address in (f"models:/{NAME}/7", f"models:/{NAME}@champion", "models:/other/1"):
        assert refused(capsys, "--model", address).startswith(f"--model: found no version '{address}' in MLflow")
    assert refused(capsys, "--model", ADDRESS, "--seed", "0").startswith("--model: found it beside --setting or --seed")
    write_params(dataset={**TREE["dataset"], "resolution": 16})
    assert refused(capsys, "--model", ADDRESS).startswith("--model: found a model of 8 px images, expected dataset.res")
    write_params(sampling={**TREE["sampling"], "lift": "data"})
    assert refused(capsys, "--model", ADDRESS).startswith("sampling.lift: found 'data' and no band std")
    write_params()
    assert refused(capsys, "--model", ADDRESS, "--statistics", "x.npz").startswith(
        "--statistics: found no file 'x.npz'"
    )
    client.create_registered_model("other")
    client.create_model_version("other", "somewhere")
    assert "is no finished version of ours" in refused(capsys, "--model", "models:/other/1")


def test_weights_that_were_changed_in_the_store_are_refused(client: MlflowClient) -> None:
    client.set_model_version_tag(NAME, "1", WEIGHTS_DIGEST, "0" * 64)
    with pytest.raises(UserError, match="found other weights in 'models:/dvdp-digits/1' than its tag"):
        registered_model(read_params(), ADDRESS)
    assert not Path("runs/models").exists()


def test_weights_that_are_gone_from_the_store_are_one_sentence(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept,) = (path for path in tmp_path.rglob("weights.safetensors") if path.parent != tmp_path)
    kept.unlink()
    assert refused(capsys, "--model", ADDRESS).startswith(f"--model: found no {kept.name} of '{ADDRESS}' where MLflow")


def test_without_mlflow_nothing_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params()
    assert "and no MLflow here" in refused(capsys, "--model", ADDRESS)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
