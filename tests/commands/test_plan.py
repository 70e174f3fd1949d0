"""``dvdp plan`` and ``turning_points: auto`` on a real small store, with and without trained settings in MLflow."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from dvdp.config import Params, parse_params, read_params
from dvdp.data.records import Form, encode
from dvdp.data.store import ImageStore
from dvdp.data.writer import StoreWriter
from dvdp.errors import UserError
from dvdp.evaluation.records import ScoreRecord
from dvdp.identity import training_identity
from dvdp.models.export import save_model
from dvdp.models.unet import UNet
from dvdp.planning.expectation import fit
from dvdp.planning.planner import Plan, Planner
from pipelines.cli import main
from pipelines.jobs.job import jobs
from pipelines.tracking.history import Trained, trained_settings
from pipelines.tracking.runs import DATASET_DIGEST, SAMPLING_HASH, Status, open_run
from pipelines.turning_points import resolve
from tests.logs import hearing
from tests.tracking.support import empty_store

TREE: dict[str, Any] = {
    "dataset": {"name": "stripes", "resolution": 16},
    "settings": {
        "ddpm": {"process": "ddpm"},
        "early": {"process": "dvdp", "turning_points": [130]},
        "other": {"process": "subspace", "turning_points": [300, 600]},
    },
    "model": {
        "model_channels": 8,
        "channel_mult": [1, 2],
        "attention_factors": [],
        "num_head_channels": 8,
        "num_classes": 0,
    },
    "training": {"images": 640, "batch": 16, "preview_steps": 5},
    "sampling": {"steps": 50, "count": 64},
    "evaluation": {"samples": 64, "kid_subset": 20},
}
AUTO = {"process": "dvdp", "turning_points": "auto", "tolerance": 0.01}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params and a prepared data set, and no MLflow yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params()
    write_store()
    return tmp_path


def write_params(**changes: Any) -> Params:
    Path("params.yaml").write_text(yaml.safe_dump({**TREE, **changes}, sort_keys=False))
    return read_params()


def write_store(resolution: int = 16, blurred: bool = False, count: int = 40) -> None:
    source = np.random.default_rng(0)
    images = []
    for _ in range(count):
        image = sum(
            (
                source.integers(0, 60, (3, resolution >> k, resolution >> k)).repeat(2**k, 1).repeat(2**k, 2)
                for k in range(3)
            ),
            np.zeros((3, resolution, resolution), int),
        )
        if blurred:
            image = image[:, ::2, ::2].repeat(2, 1).repeat(2, 2)
        images.append(image.astype(np.uint8))
    with StoreWriter(Path("data/stripes/store"), name="stripes", source="digits", form=Form(resolution)) as writer:
        writer.add(encode(images, [-1] * count, Form(resolution)))
        writer.finish()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dvdp: ")
    assert line.endswith(".")
    assert ". " not in line
    return line


def test_the_command_prints_a_frontier_and_settings_and_draws_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tolerance", "0.02", "--out", "pictures/mine.png"]) == 0
    text = capsys.readouterr().out
    assert "stripes, 16 px" in text
    assert "ddpm, 50 steps" in text
    assert "A lower bound: it ranks neither trained settings nor solvers." in text
    rows = {line.split("  ")[0]: line for line in text.splitlines() if re.search(r"\dx( |$)", line)}
    assert rows["none"].endswith("DDPM")
    assert "1.00x" in rows["none"]
    assert rows["130"].endswith("early")
    assert text.count("\n300, 600 ") == 2, "the paper's and other, each with its process"
    assert re.search(r"\n300, 600 .* other \(subspace\)\n", text)
    assert "the paper's" in rows["250, 500, 750"]
    assert "200, 400, 600, 800" not in text, "16 px and this network allow three"
    assert "Found 0 settings in MLflow" in text
    assert not Path("mlflow.db").exists(), "looking creates nothing"
    assert Image.open("pictures/mine.png").size > (500, 300)

    block = yaml.safe_load(text[text.index("settings:") :])
    chosen = [*block["settings"].values()][1]["turning_points"]
    params = parse_params({**TREE, **block})
    assert [run.turning_points for run in params.runs()] == [(), tuple(chosen)]
    assert rows[", ".join(map(str, chosen))].endswith("<- the fastest within 0.02")


def test_the_question_changes_what_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--steps", "20", "--solver", "dpm++2m", "--levels", "2", "--seconds", "4", "2", "1"]) == 0
    text = capsys.readouterr().out
    assert "dpm++2m, 20 steps" in text
    assert "191 sets of up to 2 turning points" in text
    assert "by seconds given" in text
    line = next(line for line in text.splitlines() if line.startswith("250 "))
    assert f"{4 / (0.25 * 4 + 0.75 * 2):.2f}x" in line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tolerance", "-1"], r"tolerance: found -1\.0, expected a finite number of at least 0"),
        (
            ["--tolerance", "1e-12", "--steps", "250"],
            r"tolerance: found 1e-12, expected at least \S+, which turning points of \[\d+\]",
        ),
        (["--levels", "4"], r"--levels: found 4, expected 1 to 3"),
        (["--levels", "0"], r"--levels: found 0, expected 1 to 3"),
        (["--steps", "3", "--levels", "3"], r"--levels: found 3, expected 1 to 2.* 3 steps"),
        (["--steps", "1"], r"turning_points: found 1 steps and data of 5 bands"),
        (["--steps", "0"], r"--steps: found 0, expected at least 1"),
        (["--steps", "1001"], r"steps: found 1001, expected at least 1.* at most 1000"),
        (["--solver", "ddmp"], r"--solver: found 'ddmp' \(did you mean 'ddpm'\?\)"),
        (["--seconds", "1"], r"--seconds: found \[1\.0\], expected numbers above 0"),
        (["--seconds", "1", "0"], r"--seconds: found \[1\.0, 0\.0\]"),
        (["--seconds", "2", "1"], r"--seconds: found 2 numbers, expected at least 3, one for each level of other"),
        (["--out", "plan.jpg"], r"--out: found 'plan\.jpg'"),
        (["--fisher", "nothing"], r"model: found no file 'nothing'"),
    ],
)
def test_bad_questions_are_one_sentence(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(text, refused(capsys, *arguments))


def test_data_that_cannot_be_planned_for_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    write_store(blurred=True)
    assert "data set: found band std [0.0, " in refused(capsys), "images that were enlarged"
    write_params(dataset={"name": "stripes", "resolution": 32})
    assert "dataset.resolution: found 32, expected 16" in refused(capsys)
    write_params(dataset={"name": "nothing", "resolution": 16})
    assert "data set: found no store at 'data/nothing/store'" in refused(capsys)


def test_a_network_is_asked_for_its_divergences(capsys: pytest.CaptureFixture[str]) -> None:
    write_store(count=6)
    run = read_params().runs()[1]
    save_model(Path("model.safetensors"), UNet(run.model, 1).state_dict(), {"run": run.describe()})
    assert main(["plan", "--levels", "1", "--fisher", "model.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("T ")) :]
    assert table[0].split() == ["T", "band", "0", "band", "1", "band", "2", "band", "3"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert list(rows) == [str(t) for t in range(50, 1000, 50)]
    assert "dropped" not in rows["100"]
    assert rows["150"][0] == "dropped", "at T_1 = 130"

    small = dataclasses.replace(run, resolution=8)
    save_model(Path("small.safetensors"), UNet(run.model, 1).state_dict(), {"run": small.describe()})
    assert "--fisher: found a network for 8 px" in refused(capsys, "--levels", "1", "--fisher", "small.safetensors")


# --- trained settings -------------------------------------------------------------------------------------------

SCORE = ScoreRecord(
    metrics={"fd_labels": 1.0, "precision_labels": 0.5},
    extractor="labels",
    extractor_sha256="e",
    samples=64,
    references=40,
    reference_digest="r",
    preprocessing="none",
    resolution=16,
    kid_subset=20,
    library="torch-fidelity",
    sampling={"solver": "ddpm", "steps": 50, "seed": 0},
)


def train(
    client: MlflowClient, points: tuple[int, ...], scores: list[float], status: Status = "FINISHED", **how: Any
) -> None:
    """Put into MLflow what the experiment does of trained settings, one score a seed."""
    name, digest = "".join(map(str, points)), ImageStore("data/stripes/store").metadata.digest
    setting = {"process": how.get("process", "dvdp" if points else "ddpm"), "turning_points": list(points)}
    seeds = list(range(len(scores)))
    params = parse_params({**TREE, "settings": {"s": setting}, "seeds": seeds, **how.get("params", {})})
    for run, score in zip(params.runs(), scores, strict=True):
        key = re.sub("[^a-z0-9]+", "-", f"{name}/{run.seed}/{how}")
        entry = open_run(client, params.tracking.experiment, SAMPLING_HASH, key, name)
        logged = {**training_identity(run), "flip": False}
        entry.log_params(logged)
        entry.set_tags({DATASET_DIGEST: how.get("digest", digest)})
        record = dataclasses.replace(SCORE, metrics={**SCORE.metrics, "fd_labels": score}, **how.get("terms", {}))
        entry.log_json("score.json", json.loads(record.to_json()))
        entry.set_status(status)


def known(terms: ScoreRecord | None = None) -> list[Trained]:
    params = read_params()
    return trained_settings(params, params.runs()[0], ImageStore("data/stripes/store").metadata.digest, terms)


def test_only_settings_trained_alike_and_scored_on_the_same_terms_are_taken(project: Path) -> None:
    client = empty_store(project)
    train(client, (), [5.0, 7.0])
    train(client, (300, 600), [8.0])
    train(client, (300,), [1.0], status="FAILED")
    train(client, (350,), [1.0], digest="of other data")
    train(client, (400,), [1.0], params={"training": {**TREE["training"], "images": 1280}})
    train(client, (450,), [1.0], terms={"sampling": {"solver": "ddim", "steps": 50}})
    train(client, (500,), [1.0], params={"model": {**TREE["model"], "num_classes": 2}})
    found = known()
    assert [(entry.process, entry.turning_points, entry.scores) for entry in found] == [
        ("ddpm", (), (7.0, 5.0)),
        ("dvdp", (300, 600), (8.0,)),
    ]
    assert (found[0].mean, found[1].spread) == (6, 0)
    assert found[0].spread == pytest.approx(2**0.5)
    (other,) = known(dataclasses.replace(SCORE, sampling={"solver": "ddim", "steps": 50}))
    assert other.turning_points == (450,)


def test_subspace_diffusion_lifts_as_its_own_paper_does_where_it_was_drawn_so(project: Path) -> None:
    client = empty_store(project)
    lifts = [{**SCORE.sampling, "lift": lift} for lift in ("noise", "data")]
    train(client, (300,), [8.0], terms={"sampling": lifts[0]})
    train(client, (300,), [9.0], process="subspace", terms={"sampling": lifts[1]})
    train(client, (300,), [7.0, 7.5], process="subspace", terms={"sampling": lifts[0]})
    train(client, (600,), [6.0], process="subspace", terms={"sampling": lifts[0]})
    found = known(dataclasses.replace(SCORE, sampling=lifts[0]))
    assert [(entry.process, entry.turning_points, entry.scores) for entry in found] == [
        ("dvdp", (300,), (8.0,)),
        ("subspace", (300,), (9.0,)),
        ("subspace", (600,), (6.0,)),
    ]


SWEEP = ((), (200,), (300,), (400,), (500,), (600,), (700,), (300, 600), (250, 500))


def test_enough_trained_settings_say_what_to_expect_of_others(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = empty_store(project)
    for points in SWEEP[:7]:
        train(client, points, [10 + 1000 / (points[0] if points else 1000)])
    assert main(["plan", "--levels", "2"]) == 0
    text = capsys.readouterr().out
    assert "Found 7 settings in MLflow" in text
    assert "needs 8" in text
    assert "expected" not in text.splitlines()[3]

    for points in SWEEP[7:]:
        train(client, points, [11 + 1000 / points[0], 12 + 1000 / points[0]])
    assert main(["plan", "--levels", "2"]) == 0
    text = capsys.readouterr().out
    assert "fd_labels of 64 images by ddpm, 50 steps" in text
    assert re.search(r"dvdp +300, 600 +2 +14\.83 +0\.71\n", text)
    rows = {re.split(" {2,}", line)[-1]: line.split() for line in text.splitlines()}
    assert rows["early"][-2] == "-", "at T_1 = 130, before all that were trained"
    assert rows["other (subspace)"][-3] == "-"
    assert 10 < float(rows["DDPM"][-2]) < 12
    assert float(re.findall(r"\(Spearman\) of (\S+)\.", text)[0]) > 0.8
    assert text.splitlines()[3].split()[-1] == "expected"


def plans(*sets: tuple[int, ...]) -> list[Plan]:
    std = ImageStore("data/stripes/store").metadata.band_std(4)
    planner = Planner(read_params().runs()[1], std, [t for points in sets for t in points])
    return [planner.plan(points) for points in sets]


def test_a_fit_orders_settings_it_has_not_seen_and_finds_no_order_in_chance() -> None:
    seen, scores = plans(*SWEEP), [3.0, 9, 7, 6, 5, 4.5, 4, 7.5, 8.3]
    model = fit(seen, scores)
    assert model.rank_correlation > 0.8
    late, early, unlike = (model.expected(plan) for plan in plans((650,), (250,), (150,)))
    assert late is not None
    assert early is not None
    assert 3 < late < 5 < early
    assert unlike is None
    assert abs(fit(seen, [3.0, 4, 9, 3.1, 8, 2, 7, 3.3, 5]).rank_correlation) < 0.8


# --- turning_points: auto ---------------------------------------------------------------------------------------


def chosen_points() -> tuple[tuple[int, ...], str]:
    said: list[str] = []
    with hearing(said.append):
        (job,) = jobs(resolve(read_params()))
    assert job.params.settings["chosen"].turning_points == job.run.turning_points
    return job.run.turning_points, "\n".join(said)


def test_auto_takes_what_the_command_would_and_keeps_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = write_params(settings={"chosen": AUTO})
    assert params.runs() == []
    points, said = chosen_points()
    assert f"chosen: turning points {list(points)}, the fastest of" in said
    assert "by the planner alone, as MLflow holds no trained settings like it" in said
    assert main(["plan"]) == 0
    assert f"turning_points: {list(points)}}}" in capsys.readouterr().out

    # What is trained later does not move what was chosen; another tolerance is another choice.
    train(empty_store(project), (700,), [1.0])
    assert chosen_points() == (points, said)
    write_params(settings={"chosen": {**AUTO, "tolerance": 0.05}})
    assert chosen_points()[0] != points


def test_auto_stays_within_what_was_trained(project: Path) -> None:
    client = empty_store(project)
    train(client, (430,), [5.0])
    train(client, (610, 800), [5.0])
    write_params(settings={"chosen": AUTO})
    points, said = chosen_points()
    assert points[0] == 430
    assert "with T_1 within 430 to 610, which settings that were trained cover" in said


def test_auto_that_nothing_meets_is_one_sentence() -> None:
    write_params(settings={"chosen": {**AUTO, "tolerance": 1e-12}}, sampling={**TREE["sampling"], "steps": 250})
    with pytest.raises(UserError, match=r"tolerance: found 1e-12, expected at least"):
        jobs(resolve(read_params()))


def test_auto_is_chosen_by_the_planner_alone_while_mlflow_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    write_params(settings={"chosen": AUTO})
    with caplog.at_level("INFO", "dvdp"):
        (job,) = jobs(resolve(read_params()))
    assert job.run.turning_points
    assert "by the planner alone, as MLflow did not answer" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tolerance": None}, r"settings\.chosen\.tolerance: found nothing, expected a number"),
        ({"turning_points": [300]}, r"settings\.chosen\.tolerance: found 0\.01, expected .* 'turning_points: auto'"),
        ({"tolerance": -1}, r"settings\.chosen\.tolerance: found -1, expected at least 0"),
        ({"process": "ddpm"}, r"settings\.chosen\.turning_points: found auto, expected none for process ddpm"),
        (
            {"turning_points": "atuo"},
            r"settings\.chosen\.turning_points: found 'atuo' \(did you mean 'auto'\?\), expected a list",
        ),
    ],
)
def test_auto_is_checked_when_params_are_read(change: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        parse_params({**TREE, "settings": {"chosen": {**AUTO, **change}}})
