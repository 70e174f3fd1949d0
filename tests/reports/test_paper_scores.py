"""The paper's tables and ours side by side, from a real MLflow store."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from dvdp.config import parse_params, read_params
from dvdp.evaluation.records import ScoreRecord
from dvdp.identity import training_identity
from pipelines.cli import main
from pipelines.commands.evaluate import add_evaluation
from pipelines.reports.paper import TABLES
from pipelines.reports.paper_scores import fill_tables
from pipelines.tracking.runs import DATASET, DATASET_DIGEST, SAMPLING_HASH, SETTING, START, TrackedRun, open_run
from tests.tracking.support import empty_store

SMALL = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "attention_factors": [],
    "num_head_channels": 8,
    "num_classes": 0,
    "prediction_type": "epsilon",
}
SCORE = ScoreRecord({"fid": 1.0}, "inception", "e", 50_000, 50_000, "r", "none", 32, 1000, "torch-fidelity")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params, and no MLflow yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("params.yaml").write_text(yaml.safe_dump({"tracking": {"experiment": "mine"}}))
    return tmp_path


def ran(
    client: MlflowClient,
    points: tuple[int, ...],
    scores: list[float],
    process: str = "",
    data: tuple[str, int] = ("cifar10", 32),
    speed: tuple[float, float] | None = None,
    sampling: dict[str, Any] | None = None,
    terms: dict[str, Any] | None = None,
    start: str = "",
    **sections: Any,
) -> None:
    """Put into MLflow what the experiment does of a trained setting, one score a seed.

    Args:
        speed: images a second in training, and seconds a sample.
        start: what the weights that it started from had seen.
    """
    name, resolution = data
    process = process or ("dvdp" if points else "ddpm")
    sampled = {"solver": "ddpm", "steps": 1000, "count": 50_000, "variance": "fixed_large", **(sampling or {})}
    images = {32: 64_000_000, 64: 6_400_000}.get(resolution, 12_000_000)
    tree = {
        "dataset": {"name": name, "resolution": resolution},
        "settings": {"s": {"process": process, "turning_points": list(points)}},
        "seeds": list(range(len(scores))),
        "model": SMALL,
        "training": {"images": images, "batch": 16, "budget": "images"},
        "sampling": sampled,
        **sections,
    }
    params = parse_params(tree)
    for run, score in zip(params.runs(), scores, strict=True):
        key = hashlib.sha256(f"{run.seed} {tree} {terms} {start}".encode()).hexdigest()
        entry = open_run(client, "mine", SAMPLING_HASH, key, "s")
        entry.log_params({**training_identity(run), "flip": False, **({"start": "5" * 64} if start else {})})
        tags = {DATASET: name, DATASET_DIGEST: f"digest of {name}", SETTING: "s"}
        entry.set_tags({**tags, **({START: start} if start else {})})
        told = {**run.sampling.options(), "lift": run.sampling.lift}
        record = dataclasses.replace(SCORE, metrics={"fid": score}, resolution=resolution, sampling=told)
        record = dataclasses.replace(record, **(terms or {}))
        entry.set_metrics({next(iter(record.metrics)): score}, step=640)
        if speed:
            # The first log of a run is slow; the median is not.
            rates = [Metric("images_per_second", rate, step, step) for step, rate in enumerate((1.0, *speed[:1] * 2))]
            client.log_batch(entry.run_id, metrics=rates)
            entry.set_metrics({"seconds_per_sample": speed[1]}, step=640)
        entry.log_json("score.json", json.loads(record.to_json()))
        entry.log_json("params.json", json.loads(json.dumps(dataclasses.asdict(params), default=str)))
        entry.set_status("FINISHED")


def report() -> dict[tuple[str, str, str], dict[str, str]]:
    """The lines of the CSV file, by table, data set and setting."""
    assert main(["report", "--out", "out"]) == 0
    with Path("out/tables.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(table.rows) for table in TABLES)
    keyed = {(line["table"], f"{line['data_set']} {line['resolution']}", line["setting"]): line for line in lines}
    assert len(keyed) == len(lines)
    return keyed


def filled(lines: dict[tuple[str, str, str], dict[str, str]]) -> dict[tuple[str, str, str], float]:
    return {key: float(line["score"]) for key, line in lines.items() if line["score"]}


def test_without_any_run_the_papers_numbers_stand_beside_empty_cells(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report()
    assert "Scored runs in the tables: 0, from MLflow's experiment 'mine'." in capsys.readouterr().out
    assert not Path("mlflow.db").exists(), "reading creates nothing"
    assert filled(lines) == {}
    ours = list(next(iter(lines.values())))[9:]
    assert ours[0] == "metric"
    assert {line[name] for line in lines.values() for name in ours} == {""}

    church = lines["Table 1", "LSUN Church 256", "DVDP {300, 600}"]
    assert [church[name] for name in list(church)[4:9]] == ["7.03", "0.45", "2.2", "5.01", "2.4"]
    assert lines["Table 1", "CIFAR-10 32", "DDPM"]["paper_seconds_per_sample"] == "0.34"
    assert lines["Table 2", "FFHQ 1024", "DVDP {200, 400, 600, 800}, DDIM"]["paper_fid"] == "12.43"
    assert lines["Table 3", "CelebA 128", "K = 2, {250, 500}"]["paper_training_speedup"] == "2.24"
    text = Path("out/tables.md").read_text()
    assert "| CIFAR-10, 32 px | DVDP {600} | 3.24 |  | 0.15 s, 1.2x |  | 0.26 s, 1.3x |  |  |" in text
    assert "†" not in text
    assert sorted(path.name for path in Path("out").iterdir()) == ["tables.csv", "tables.html", "tables.md"]


def test_runs_fill_the_cells_of_their_data_set_and_setting_and_no_others(project: Path) -> None:
    client = empty_store(project)
    ran(client, (), [3.0, 4.0], speed=(100.0, 0.5))
    # Sampling seems faster than its FLOPs allow: that is no measurement.
    ran(client, (600,), [3.5, 4.5, 5.5], speed=(125.0, 0.25))
    # Of no row: other turning points, data sets and resolutions.
    ran(client, (300,), [1.0])
    ran(client, (600,), [1.0], data=("digits", 32))
    ran(client, (600,), [1.0], data=("cifar100", 32))
    ran(client, (600,), [1.0], data=("cifar10", 16))
    ran(client, (600,), [1.0], process="subspace")
    lines = report()
    ddpm, dvdp = ("Table 1", "CIFAR-10 32", "DDPM"), ("Table 1", "CIFAR-10 32", "DVDP {600}")
    assert filled(lines) == {ddpm: 3.5, dvdp: 4.5}
    told = ("metric", "spread", "seeds", "samples", "extractor", "solver", "steps", "training_images", "differs")
    assert [lines[dvdp][name] for name in told] == [
        "fid",
        "1.0",
        "3",
        "50000",
        "inception",
        "ddpm",
        "1000",
        "64000000",
        "",
    ]
    assert [lines[dvdp][f"{what}_speedup"] for what in ("training", "sampling")] == ["1.25", ""]
    text = Path("out/tables.md").read_text()
    assert "| 3.24 | 4.50 ± 1.00 | 0.15 s, 1.2x | 1.25x | 0.26 s, 1.3x |  | fid (inception), 50,000 samples" in text
    assert "†" not in text
    left_out = "1 of cifar10 (16 px), 2 of cifar10 (32 px), 1 of cifar100 (32 px), 1 of digits (32 px)."
    assert left_out in text
    page = Path("out/tables.html").read_text()
    assert page.index("Your own runs") < page.index("digits (32 px)</span>") < page.index("Table 1")
    assert page.index("CIFAR-10, 32 px") < page.index("8 rows of the paper, without a run of ours"), "of Table 1"
    empty = [page.rindex("<details>", 0, page.index(f"{name}, 256 px")) for name in ("LSUN Church", "FFHQ")]
    assert all(page.index("</details>", start) > page.index("LSUN Church, 256 px") for start in empty)


def test_scores_on_other_terms_are_marked_and_the_footnote_says_what_differs(project: Path) -> None:
    client = empty_store(project)
    few = {"metrics": {"fd_labels": 9.0}, "extractor": "labels", "samples": 256}
    ran(client, (600,), [9.0], data=("cifar10-images", 32), sampling={"steps": 50}, terms=few)
    ran(client, (300, 600), [7.0], data=("lsun-church", 256))
    lines = report()
    differs = "fd_labels, which is not FID; 256 samples, not 50,000; 50 steps, not 1000"
    assert lines["Table 1", "CIFAR-10 32", "DVDP {600}"]["differs"] == differs
    for name in ("tables.md", "tables.html"):
        text = Path("out", name).read_text().replace("&#39;", "'")
        assert "9.00 †" in text
        assert f"† CIFAR-10, 32 px: does not compare with the paper's ({differs})." in text
        assert len(re.findall("†", text)) == 2, "the church is on the paper's terms"
        assert "7.00" in text


def test_a_start_from_weights_is_marked_and_stands_beside_no_run_from_scratch(project: Path) -> None:
    client, before = empty_store(project), "9,000 images, 5.00e+12 FLOPs"
    ran(client, (600,), [3.5])
    ran(client, (600,), [2.5], start=before)
    ran(client, (300, 600), [7.0], data=("lsun-church", 256), start=before)
    lines = report()
    assert filled(lines)["Table 1", "CIFAR-10 32", "DVDP {600}"] == 3.5
    assert lines["Table 1", "CIFAR-10 32", "DVDP {600}"]["differs"] == ""
    differs = lines["Table 1", "LSUN Church 256", "DVDP {300, 600}"]["differs"]
    assert differs == f"a start from weights that had seen {before}"


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"sampling": {"solver": "ddim"}}, "ddim, not ddpm"),
        ({"sampling": {"timestep_spacing": "quadratic"}}, "quadratic timesteps"),
        ({"sampling": {"lift": "data"}}, "a lift with the variance of the data"),
        ({"sampling": {"variance": "fixed_small"}}, "variance fixed_small, not fixed_large"),
        ({"sampling": {"clip": False}}, "predicted images that are not clipped"),
        (
            {"sampling": {"steps": 500, "share": [250, 250]}},
            "500 steps, not 1000; steps that are not shared by the lengths of the levels",
        ),
        (
            {"sampling": {"steps": 500, "share": "cost"}},
            "500 steps, not 1000; steps that are not shared by the lengths of the levels",
        ),
        ({"sampling": {"share": [600, 400]}}, ""),
        ({"schedule": {"base": "cosine"}}, "a cosine base, not linear"),
        ({"schedule": {"shift": -2.0}}, "a shift of the log-SNR by -2"),
        ({"schedule": {"attenuation": "linear"}}, "attenuation linear, not cosine"),
        ({"schedule": {"floor": 0.3}}, "a floor of 0.3, not 0.1"),
        ({"model": {**SMALL, "prediction_type": "v_prediction"}}, "the target v_prediction, not epsilon"),
        (
            {"training": {"images": 1280, "batch": 16, "budget": "images"}},
            "1,280 training images, not 64,000,000",
        ),
        ({"model": {**SMALL, "networks": "per_level"}}, "one for each level, not one network for all levels"),
        ({"model": {**SMALL, "num_classes": 10}}, "a class-conditional network"),
    ],
)
def test_true_fid_by_other_means_than_the_papers_is_marked_too(
    project: Path, change: dict[str, Any], differs: str
) -> None:
    ran(empty_store(project), (600,), [3.0], **change)
    assert report()["Table 1", "CIFAR-10 32", "DVDP {600}"]["differs"] == differs


def test_what_a_process_does_not_have_is_no_difference(project: Path) -> None:
    ran(empty_store(project), (), [3.0], schedule={"attenuation": "linear", "floor": 0.3}, sampling={"share": "cost"})
    assert report()["Table 1", "CIFAR-10 32", "DDPM"]["differs"] == ""


def test_the_variance_of_a_deterministic_solver_is_no_difference_and_its_eta_is(project: Path) -> None:
    client, points, terms = empty_store(project), (200, 400, 600, 800), {"samples": 10_000}
    how = {"solver": "ddim", "steps": 675, "variance": "fixed_small"}
    cell = ("Table 2", "FFHQ 1024", "DVDP {200, 400, 600, 800}, DDIM")
    ran(client, points, [12.0], data=("ffhq1024", 1024), sampling={**how, "eta": 0.5}, terms=terms)
    assert report()[cell]["differs"] == "eta = 0.5, not 0"
    ran(client, points, [12.0], data=("ffhq1024", 1024), sampling=how, terms=terms)
    assert report()[cell]["differs"] == ""


def test_of_figure_4_each_process_is_shown_with_the_lift_of_its_own_paper(project: Path) -> None:
    client, celeba, two = empty_store(project), ("celeba64", 64), {**SMALL, "networks": "per_level"}
    ran(client, (100,), [4.0], data=celeba, model=two)
    for process, lift, score in (("subspace", "data", 6.0), ("dvdp", "data", 5.0), ("subspace", "noise", 7.0)):
        # Another seed of another lift is no second seed.
        ran(
            client, (100,), [score] * (2 if lift == "noise" else 1), process, celeba, sampling={"lift": lift}, model=two
        )
    # Where subspace diffusion was not drawn as its paper does, it is shown beside DVDP all the same, and marked.
    ran(client, (200,), [8.0], "subspace", celeba, model=two)
    lines = report()
    shown = {name: (line["score"], line["differs"]) for (_, _, name), line in lines.items() if line["score"]}
    assert shown == {
        "DVDP {100}": ("4.0", ""),
        "subspace {100}": ("6.0", ""),
        "subspace {200}": ("8.0", "a lift without the variance of the data"),
    }
    assert Path("out/figure4.png").is_file()


def test_of_several_groups_of_runs_the_one_nearest_to_the_paper_is_shown_whole(project: Path) -> None:
    client = empty_store(project)
    ran(client, (), [3.0])
    ran(client, (), [20.0], sampling={"steps": 50})
    ran(client, (600,), [21.0], sampling={"steps": 50})
    ran(client, (600,), [30.0], training={"images": 1280, "batch": 16, "budget": "images"}, sampling={"steps": 20})
    assert list(filled(report()).values()) == [3.0], "no DDPM of 1000 steps beside DVDP of 50"
    ran(client, (600,), [4.0])
    assert list(filled(report()).values()) == [3.0, 4.0]


def test_settings_on_equal_flops_are_trained_alike(project: Path) -> None:
    client = empty_store(project)
    for points in ((), (600,)):
        ran(client, points, [5.0], training={"images": 640, "batch": 16, "budget": "flops"})
    lines = [line for line in report().values() if line["score"]]
    assert len(lines) == 2
    assert len({line["training_images"] for line in lines}) == 2


def test_one_training_sampled_in_two_ways_fills_two_rows(project: Path) -> None:
    client, points, ffhq = empty_store(project), (200, 400, 600, 800), ("ffhq1024", 1024)
    ran(client, points, [10.0], data=ffhq, terms={"samples": 10_000})
    ran(client, points, [12.0], data=ffhq, sampling={"solver": "ddim", "steps": 675}, terms={"samples": 10_000})
    ran(client, points, [15.0], data=ffhq, sampling={"solver": "ddim", "steps": 100}, terms={"samples": 10_000})
    lines = report()
    assert {line["solver"]: (line["score"], line["differs"]) for line in lines.values() if line["score"]} == {
        "ddim": ("12.0", ""),
        "ddpm": ("10.0", ""),
    }


def test_an_evaluation_on_other_terms_fills_no_cell_and_is_not_counted(project: Path) -> None:
    client = empty_store(project)
    ran(client, (), [3.0])
    before = report()
    told = fill_tables(read_params()).left_out
    (entry,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    run = TrackedRun(client, entry.info.run_id, entry.info.experiment_id)
    add_evaluation(run, dataclasses.replace(SCORE, metrics={"fid": 1.0}, samples=10), step=640)
    assert len(client.search_runs([entry.info.experiment_id])) == 2
    assert report() == before
    assert fill_tables(read_params()).left_out == told


def test_the_figure_is_drawn_when_both_processes_ran_and_the_page_needs_nothing_else(project: Path) -> None:
    client, celeba = empty_store(project), ("celeba64", 64)
    for T in (100, 200):
        ran(client, (T,), [5.0, 6.0], data=celeba, model={**SMALL, "networks": "per_level"})
    report()
    assert not Path("out/figure4.png").exists()
    ran(client, (100,), [9.0], process="subspace", data=celeba, model={**SMALL, "networks": "per_level"})
    ran(client, (200,), [9.0], process="subspace", data=celeba)
    lines = report()
    assert lines["Fig. 4", "CelebA 64", "subspace {100}"]["score"] == "9.0"
    assert lines["Fig. 4", "CelebA 64", "subspace {200}"]["score"] == "", "of one network for both levels"
    Image.open("out/figure4.png").verify()
    assert "(figure4.png)" in Path("out/tables.md").read_text()
    page = Path("out/tables.html").read_text()
    assert "{%" not in page
    assert re.findall(r"""(?:src|href)=["']?(.{10})""", page) == ["data:image"]
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^\"]*", "", page))


def test_an_unavailable_server_and_a_file_in_the_way_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--out", "params.yaml"]) == 2
    assert capsys.readouterr().err.startswith("dvdp: --out: found 'params.yaml/tables.html', expected")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["report", "--out", "out"]) == 2
    assert capsys.readouterr().err.startswith("dvdp: MLFLOW_TRACKING_URI: found no answer from MLflow there")
    assert not Path("out").exists()
