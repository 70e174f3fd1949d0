"""The committed results are those of this code: what is counted is equal, what is derived follows."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import activation_checkpointing, level_batch, loading, ranks, steps, steps_report, throughput
from benchmarks.baseline import TURNS, compare, read_result
from dvdp.config import read_params

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "benchmarks/results"
OF_STEPS = ("steps.json", "steps_64_batch60.json", "baseline_64.json")


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


@pytest.mark.parametrize("name", OF_STEPS)
def test_flops_bounds_and_parameters_are_what_they_were(name: str) -> None:
    for case in read(name)["cases"]:
        _, model = steps.SIZES[case["resolution"]]
        for key, now in json.loads(json.dumps(steps.exact(case["resolution"], case["batch"], model))).items():
            # Diffusers' are only counted where it is installed.
            then = {each: case[key][each] for each in now} if key in ("forward_flops", "parameters") else case[key]
            assert now == then, f"{case['resolution']} px: {key}"


def test_no_result_names_a_folder_of_the_machine_that_made_it() -> None:
    commands = [
        found["machine"]["command"]
        for path in RESULTS.glob("*.json")
        if "command" in (found := json.loads(path.read_text())).get("machine", {})
    ]
    assert commands
    # Before, results of studies were made in /tmp.
    assert not [command for command in commands if re.search(r"(?<![\w.:])/(?!tmp/study)\w", command)]


def test_estimates_and_copies_are_as_near_as_the_docs_say() -> None:
    worst = read("estimates.json")["worst"]
    assert max(worst["seconds_per_step_error"], worst["seconds_per_sample_error"]) < 0.195
    assert worst["mib_error"] < 0.075
    assert worst["mib_counted_error"] < 0.035
    for found in read("copies.json")["data_sets"].values():
        shares = {title: each["either"] for title, each in found["taken_for_copies"].items()}
        assert shares["new"] <= 0.01
        assert all(shares[title] >= 0.95 for title in ("equal", "mirrored", "noise of 10", "JPEG of quality 75"))


def test_ratios_follow_from_what_was_measured() -> None:
    for name in OF_STEPS:
        result = read(name)
        derived = [steps.ratios(case) for case in result["cases"]]
        assert result["ratios"] == pytest.approx({key: value for each in derived for key, value in each.items()}), name
    assert read("activation_checkpointing.json")["ratios"] == pytest.approx(
        activation_checkpointing.ratios(read("activation_checkpointing.json")["cases"])
    )
    assert read("loading.json")["ratios"] == pytest.approx(loading.ratios(read("loading.json")["ways"]))
    batches = [level_batch.ratios(case) for case in read("level_batch.json")["cases"]]
    assert read("level_batch.json")["ratios"] == pytest.approx({k: v for each in batches for k, v in each.items()})
    assert level_batch.table(read("level_batch.json")) in (PROJECT / "docs/performance.md").read_text()
    measured = [ranks.ratios(case) for case in read("ranks.json")["measured"]]
    assert read("ranks.json")["ratios"] == pytest.approx({k: v for each in measured for k, v in each.items()})


def test_what_ranks_keep_follows_from_the_measured_steps() -> None:
    found = read("ranks.json")["computed"]
    now = [
        ranks.computed(case, precision)
        for case in read("steps.json")["cases"]
        for precision in case["sampling_seconds_per_call"]
    ]
    assert len(now) == len(found)
    for then, row in zip(found, now, strict=True):
        assert (then["resolution"], then["precision"], then["bound"]) == (
            row["resolution"],
            row["precision"],
            row["bound"],
        )
        for number, kept in row["share_of_bound_kept"].items():
            assert then["share_of_bound_kept"][number] == pytest.approx(kept)


def test_every_ratio_is_a_finite_number_by_name() -> None:
    stating = [path for path in RESULTS.glob("*.json") if "ratios" in json.loads(path.read_text())]
    assert {*OF_STEPS, "loading.json", "ranks.json", "activation_checkpointing.json", "throughput_32_cpu.json"} <= {
        path.name for path in stating
    }
    for path in stating:
        result = read_result(path)
        assert all(math.isfinite(value) for value in result["ratios"].values())
        assert compare(result, result).startswith(f"None of {len(result['ratios'])} ratios")


def test_the_benchmark_that_make_runs_has_its_baseline() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    assert "--resolutions 64 --precisions fp32" in makefile
    assert "--baseline benchmarks/results/baseline_64.json" in makefile
    result = read("baseline_64.json")
    assert result["turns"] >= TURNS
    assert result["ratios"].keys() == result["spreads"].keys()
    assert f"export MALLOC_MMAP_THRESHOLD_ := {result['machine']['malloc']}\n" in makefile
    assert result["machine"]["threads"] == 1


@pytest.mark.parametrize(("resolution", "preset"), [(32, "cifar10-32"), (256, "church-256")])
def test_the_papers_protocol_is_that_of_the_presets(resolution: int, preset: str) -> None:
    params = read_params(PROJECT / f"presets/{preset}.yaml")
    batch, sampling_batch, turning_points, model = throughput.PAPER[resolution]
    assert model == params.model
    assert model.prediction_type == "epsilon"
    assert (batch, sampling_batch) == (params.training.batch, params.sampling.batch)
    assert turning_points == [*params.settings.values()][-1].turning_points


def test_what_is_compared_with_diffusers_predicts_what_it_does() -> None:
    assert {model.prediction_type for _, model in {**steps.SIZES, **steps.TOY}.values()} == {"epsilon"}
    assert {case["network"]["prediction_type"] for case in read("steps.json")["cases"]} == {"epsilon"}


def test_goals_are_called_met_only_where_they_are() -> None:
    names = list(steps_report.GOALS)
    text = steps_report.goals({names[0]: 2.38, names[1]: 2.37})
    assert f"| {names[0]} | 2.38x | 2.38x | yes |" in text
    assert f"| {names[1]} | 2.38x | 2.37x | **no** |" in text
    assert f"| {names[2]} | 2.43x | not measured | **no** |" in text
    assert steps_report.goals(read("steps.json")["ratios"]) in (PROJECT / "docs/performance.md").read_text()
