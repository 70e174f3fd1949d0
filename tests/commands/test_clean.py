"""`dvdp clean` shows what would go, removes it when told, and nothing that a run in progress or a person needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from dvdp.config import parse_params
from dvdp.errors import UserError
from dvdp.files import locked, write_atomically
from pipelines.cli import main
from pipelines.commands.clean import KEPT_TAGS, clean
from pipelines.left_behind import RUNNING
from pipelines.tracking import registry
from pipelines.tracking.champion import CHAMPIONS
from pipelines.tracking.runs import COMPARISON_HASH, SETTING, TRAINING_HASH, TrackedRun, open_run
from tests.tracking.support import empty_store, free_port, prefect_server, small_model

PARAMS = parse_params({})
MODEL = "dvdp-digits"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def make_run(name: str, *missing: str) -> Path:
    folder = Path("runs") / name
    files = {
        "weights.safetensors": b"w" * 100,
        "metrics.jsonl": b"m",
        "run.json": b'{"run": {"setting": "ddpm", "seed": 3}}',
        "checkpoints/000000000800.safetensors": b"c" * 5000,
        "samples/one/0.npy": b"s" * 3000,
        "samples/other/0.npy": b"s" * 3000,
        "scores/one.json": b"{}",
        "driver.lock": b"",
        "one.lock": b"",
    }
    for file, content in files.items():
        if not file.startswith(missing or ("-",)):
            write_atomically(folder / file, content)
    return folder


def there(folder: Path) -> set[str]:
    return {path.parts[0] for path in (p.relative_to(folder) for p in folder.rglob("*")) if path.suffix != ".lock"}


def test_a_dry_run_lists_and_keeps_all_and_yes_removes_what_was_listed() -> None:
    folder = make_run("finished")
    before = there(folder)
    listed = clean(PARAMS)
    assert re.search(r"checkpoints +0.0000 GiB  runs/finished \(ddpm, seed 3\)\n", listed)
    assert listed.endswith("2 in all, 0.0000 GiB: nothing was removed yet, the same command with --yes does it.")
    assert there(folder) == before
    assert clean(PARAMS, yes=True).splitlines()[:-1] == listed.splitlines()[:-1]
    assert before - there(folder) == {"checkpoints"}
    assert not any((folder / "samples").iterdir())
    assert (folder / "weights.safetensors").read_bytes() == b"w" * 100
    assert clean(PARAMS) == "0 in all, 0.0000 GiB: nothing was removed yet, the same command with --yes does it."


def test_what_is_not_finished_not_scored_or_held_stays() -> None:
    unfinished, unscored, held = make_run("a", "weights"), make_run("b", "scores"), make_run("c")
    before = {folder: there(folder) for folder in (unfinished, unscored, held)}
    for lock in ("driver.lock", "one.lock"):
        with locked(held / lock):
            clean(PARAMS, yes=True)
        assert there(held) == before[held]
    assert there(unfinished) == before[unfinished]
    assert before[unscored] - there(unscored) == {"checkpoints"}


def test_an_experiment_in_progress_keeps_the_samples_that_its_report_shows() -> None:
    folder = make_run("a")
    with locked(RUNNING / "flow.lock"):
        assert "samples      all kept: an experiment runs here" in clean(PARAMS, yes=True)
    assert (folder / "samples" / "one" / "0.npy").is_file()
    assert not (folder / "checkpoints").exists()


def test_what_is_to_be_kept_is_named_by_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("a")
    Path("params.yaml").touch()
    assert main(["clean", "--keep", "samples", "--keep", "artifacts", "--yes"]) == 0
    assert "samples      all kept\n" in capsys.readouterr().out
    assert (folder / "samples" / "one").is_dir()
    assert not (folder / "checkpoints").exists()
    with pytest.raises(UserError, match=r"--keep: found 'sample' \(did you mean 'samples'\?\), expected one of check"):
        clean(PARAMS, ["sample"])


def make_version(client: MlflowClient, number: int, parent: TrackedRun | None = None) -> str:
    run = open_run(client, "dvdp", TRAINING_HASH, f"hash{number}", f"run{number}")
    if parent:
        run.set_tags({MLFLOW_PARENT_RUN_ID: parent.run_id})
    run.set_status("FINISHED")
    weights = small_model(Path(f"weights{number}.safetensors"), seed=number)
    made = registry.register(run, MODEL, weights, {TRAINING_HASH: f"hash{number}", SETTING: f"s{number}"})
    assert int(made.version) == number
    return run.run_id


def test_versions_go_with_their_files_unless_they_were_or_are_needed(project: Path) -> None:
    client = empty_store(project)
    # Saving a model as MLflow does it takes seconds, so there are no more of them than it takes.
    older = open_run(client, "dvdp", COMPARISON_HASH, "a", "comparison")
    newest = open_run(client, "dvdp", COMPARISON_HASH, "b", "comparison")
    runs = [make_version(client, number, newest if number == 4 else older) for number in range(1, 6)]
    client.set_registered_model_alias(MODEL, "champion", "1")
    client.set_registered_model_tag(MODEL, CHAMPIONS, "2 1")
    client.set_model_version_tag(MODEL, "3", KEPT_TAGS[0], "for the talk")

    def numbers() -> list[int]:
        return sorted(int(v.version) for v in client.search_model_versions(f"name = '{MODEL}'"))

    assert "version 5 of dvdp-digits (s5)" in (listed := clean(PARAMS))
    assert listed.count("version ") == 1
    assert numbers() == [1, 2, 3, 4, 5]
    client.update_run(runs[4], status="RUNNING")
    assert "version " not in clean(PARAMS, yes=True)
    client.update_run(runs[4], status="FINISHED")
    client.copy_model_version(f"models:/{MODEL}/5", "production")
    assert "version " not in clean(PARAMS, yes=True)
    client.delete_registered_model("production")
    location = Path(str(client.get_model_version(MODEL, "5").source).removeprefix("file://"))
    assert location.is_dir()
    clean(PARAMS, yes=True)
    assert numbers() == [1, 2, 3, 4]
    assert not any(location.rglob("*"))
    assert len(client.search_logged_models([client.get_run(runs[0]).info.experiment_id])) == 4
    assert "version " not in clean(PARAMS, yes=True)


def test_servers_that_do_not_answer_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    # Prefect reads the environment when it is imported, which another test may have done.
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        listed = clean(PARAMS)
    assert "versions     all kept: MLflow does not answer\n" in listed
    assert "artifacts    all kept: Prefect does not answer\n" in listed


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with prefect_server(tmp_path, free_port()) as address, temporary_settings({PREFECT_API_URL: address}):
        yield address


@pytest.mark.slow
def test_old_artifacts_go_but_for_the_newest_of_each_key_and_those_of_others(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server)
    monkeypatch.setattr("pipelines.commands.clean.PAGE", 3)
    from prefect.artifacts import create_markdown_artifact
    from prefect.client.orchestration import get_client

    kept = [create_markdown_artifact("of others", key=key) for key in 2 * ["weather-digits"] + 2 * ["report-faces"]]
    gone = [create_markdown_artifact("x" * 1000, key="report-digits") for _ in range(5)]
    kept.append(create_markdown_artifact("newest", key="report-digits"))
    gone.append(create_markdown_artifact("old", key="process-digits-ddpm"))
    kept.append(create_markdown_artifact("newest", key="process-digits-ddpm"))

    assert "artifacts" not in clean(PARAMS, days=1), "too young"
    listed = clean(PARAMS, days=0)
    assert listed.count("artifacts ") == len(gone)
    assert f"report-digits of {datetime.now(UTC) - timedelta(seconds=60):%Y-%m-}" in listed
    clean(PARAMS, days=0, yes=True)
    with get_client(sync_client=True) as client:
        assert {artifact.id for artifact in client.read_artifacts(limit=200)} == set(kept)
