"""A ratio that fell, is gone or makes no sense is noticed, and what was not compared is said."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import steps
from benchmarks.baseline import TURNS, UNKNOWN, compare, read_result, tolerance
from benchmarks.timing import spreads, warn_of_allocator
from dvdp.errors import UserError
from tests.benchmarks.support import run_module

BASELINE = {
    "machine": {"malloc": "1073741824", "threads": 1},
    "cases": [{"resolution": 64, "batch": 20}],
    "ratios": {"64 px, training": 2.4, "64 px, sampling": 2.5, "64 px, diffusers over ours": 1.1},
    "spreads": {"64 px, training": 0.001, "64 px, sampling": 0.02, "64 px, diffusers over ours": 0.2},
}


def found(**changes: Any) -> dict[str, Any]:
    return {**BASELINE, **changes}


def test_the_tolerance_is_that_of_the_baselines_noise_within_limits() -> None:
    assert tolerance(BASELINE, "64 px, training") == 0.03
    assert tolerance(BASELINE, "64 px, sampling") == pytest.approx(0.06)
    assert tolerance(BASELINE, "64 px, diffusers over ours") == 0.10
    assert tolerance({"ratios": {"old": 1.0}}, "old") == UNKNOWN
    assert spreads([{"a": value} for value in (1.0, 2.0, 3.0, 4.0, 5.0)]) == {"a": pytest.approx(1 / 3)}
    assert spreads([{"a": 2.0}]) == {"a": 0.0}


def test_a_ratio_that_fell_by_more_than_its_tolerance_is_named_in_one_sentence() -> None:
    fallen = {"64 px, training": 2.34, "64 px, sampling": 2.36, "64 px, diffusers over ours": 1.0}
    assert "None of 3 ratios" in compare(found(ratios=fallen), BASELINE)
    fallen["64 px, training"] = 2.32
    with pytest.raises(UserError, match=r"^64 px, training: found 2\.320, expected at least 2\.400 less 3\.0% .*\.$"):
        compare(found(ratios=fallen), BASELINE)
    with pytest.raises(UserError) as error:
        compare(found(ratios=dict.fromkeys(fallen, 0.5)), BASELINE)
    assert [str(error.value).count(name) for name in fallen] == [1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_fails_on_either_side(value: float) -> None:
    wrong = found(ratios={**BASELINE["ratios"], "64 px, training": value})
    with pytest.raises(UserError, match=r"64 px, training: found (nan|inf) in this run, expected a finite number"):
        compare(wrong, BASELINE)
    with pytest.raises(UserError, match=r"64 px, training: found (nan|inf) in the baseline, expected a finite number"):
        compare(BASELINE, wrong)
    new = found(ratios={**BASELINE["ratios"], "128 px": value})
    with pytest.raises(UserError, match="128 px: found"):
        compare(new, BASELINE)


def test_a_ratio_that_is_missing_fails_unless_the_run_was_not_asked_for_it() -> None:
    fewer = {name: value for name, value in BASELINE["ratios"].items() if "diffusers" not in name}
    with pytest.raises(UserError, match=r"64 px, diffusers over ours: found no such ratio, expected one near 1\.10"):
        compare(found(ratios=fewer), BASELINE)
    told = compare(found(ratios=fewer, left_out={"diffusers": "diffusers is not installed"}), BASELINE)
    assert "None of 2 ratios" in told
    assert "Not compared (diffusers is not installed): 64 px, diffusers over ours." in told
    assert "Not compared (the baseline lacks them): 64 px, diffusers" in compare(BASELINE, found(ratios=fewer))
    with pytest.raises(UserError, match="ratios: found none that the baseline has"):
        compare(found(ratios={}, left_out={"64 px": "not in --resolutions"}), BASELINE)


def test_what_was_measured_otherwise_is_not_comparable() -> None:
    with pytest.raises(
        UserError, match="MALLOC_MMAP_THRESHOLD_: found default, expected 1073741824 as in the baseline"
    ):
        compare(found(machine={"malloc": "default", "threads": 1}), BASELINE)
    with pytest.raises(UserError, match="images a step at 64 px: found 60, expected 20"):
        compare(found(cases=[{"resolution": 64, "batch": 60}, {"resolution": 32, "batch": 20}]), BASELINE)


def test_any_two_results_are_compared_from_the_command_line(tmp_path: Path) -> None:
    result, baseline, wrong = (tmp_path / f"{name}.json" for name in ("result", "baseline", "wrong"))
    baseline.write_text(json.dumps(BASELINE))
    result.write_text(json.dumps(found(ratios={**BASELINE["ratios"], "64 px, training": 1.0})))
    wrong.write_text(json.dumps({"ratios": {"a": [1.0, 2.0]}}))
    done = run_module("benchmarks.baseline", baseline, baseline)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_module("benchmarks.baseline", result, baseline)
    assert done.returncode == 1
    assert done.stderr.startswith("64 px, training: found 1.000, expected at least 2.400")
    for path in (wrong, tmp_path / "gone.json"):
        with pytest.raises(UserError, match="cannot read ratios"):
            read_result(path)


def test_a_regression_fails_the_command(tmp_path: Path) -> None:
    kinds = ("training, DDPM over DVDP, all levels a step", "sampling, DDPM over DVDP")
    ratios = {f"16 px, fp32, {kind}": 1000.0 for kind in kinds}
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"ratios": {**ratios, "16 px, bf16, sampling, DDPM over DVDP": 1000.0}}))
    common = ["benchmarks.steps", "--resolutions", 16, "--precisions", "fp32", "--baseline", path]
    done = run_module(*common, MALLOC_MMAP_THRESHOLD_="1073741824")
    assert done.returncode == 1
    assert done.stderr.count("expected at least 1000.000 less 7.0% as in the baseline") == len(ratios)
    assert "Traceback" not in done.stderr
    assert "MALLOC" not in done.stderr


def test_too_few_turns_are_not_compared_with_a_baseline(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(BASELINE))
    with pytest.raises(UserError, match=f"--turns: found 3, expected at least {TURNS}"):
        steps.run(Namespace(baseline=path, turns=3))


def test_a_missing_allocator_setting_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1073741824")
    warn_of_allocator(torch.device("cpu"))
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    warn_of_allocator(torch.device("cpu"))
    assert capsys.readouterr().err.startswith("MALLOC_MMAP_THRESHOLD_: found nothing in the environment")
