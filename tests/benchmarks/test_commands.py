"""The benchmarks run, and say what a regression is."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import steps_report, throughput
from benchmarks.baseline import compare
from benchmarks.ranks import computed, slowest_level
from benchmarks.timing import in_turns, peak_memory, take_turns
from dvdp.errors import UserError
from tests.benchmarks.support import run_module


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steps") / "steps.json"
    done = run_module("benchmarks.steps", "--resolutions", 16, "--turns", 1, "--out", path)
    assert done.returncode == 0, done.stderr
    return path


def test_steps_are_measured_for_every_setting_level_and_precision(result: Path) -> None:
    found = json.loads(result.read_text())
    (case,) = found["cases"]
    for precision in ("fp32", "bf16"):
        for kind in ("ddpm", "level 0", "level 1", "level 2", "all levels"):
            assert case["training_seconds"][f"{precision} {kind}"] > 0
            assert case["training_tflops_per_second"][f"{precision} {kind}"] > 0
        assert len(case["sampling_seconds_per_call"][precision]) == 3
        assert found["ratios"][f"16 px, {precision}, sampling, DDPM over DVDP"] > 0
        seconds = case["training_seconds"]
        one = sum(share * seconds[f"{precision} level {k}"] for k, share in enumerate((0.3, 0.3, 0.4)))
        ratio = found["ratios"][f"16 px, {precision}, training, DDPM over DVDP, one level a step"]
        assert ratio == pytest.approx(seconds[f"{precision} ddpm"] / one), "over DDPM's own step, as ranks.py has it"
    assert found["ratios"].keys() == found["spreads"].keys()
    assert found["left_out"]["64 px, "] == "not in --resolutions"
    assert found["machine"]["command"].startswith("python -m benchmarks.steps ")
    assert case["images_per_level"] == [3, 3, 4]
    flops = case["forward_flops"]
    assert all(a > b for a, b in zip(flops["levels, every convolution as written"], flops["levels"], strict=True))


def test_table_and_plot_are_made_from_the_result(result: Path) -> None:
    found = json.loads(result.read_text())
    text = steps_report.table(found)
    begin, end = steps_report.BEGIN.format("steps"), steps_report.END.format("steps")
    page = steps_report.put_in(f"before\n{begin}\nold\n{end}\nafter", "steps", text)
    assert "old" not in page
    assert page.startswith("before")
    assert page.endswith("after")
    assert page.count("| 16 | bf16 |") == 2
    assert steps_report.put_in(page, "steps", text) == page
    assert steps_report.plot(found).startswith(b"\x89PNG")
    kept = {"ours, all": 0.75, "ours, one": 0.5}
    measured = [{"resolution": 16, "precision": "fp32", "ranks": 2, "share_of_bound_kept": kept}]
    ranks = steps_report.ranks_table({"computed": [computed(found["cases"][0], "fp32")], "measured": measured})
    assert ranks.count("| 16 | fp32 |") == 3
    assert "| 16 | fp32, measured | 2 | 75% | 50% |  |  |" in ranks
    with pytest.raises(UserError, match="expected the place for the table"):
        steps_report.put_in(page, "ranks", "")


def test_the_slowest_level_of_many_ranks_counts() -> None:
    seconds, shares = [4.0, 1.0, 0.25], [0.3, 0.3, 0.4]
    assert slowest_level(seconds, shares, 1) == pytest.approx(1.6)
    assert slowest_level(seconds, shares, 2) == pytest.approx(4 * (1 - 0.49) + 1 * (0.49 - 0.16) + 0.25 * 0.16)
    assert slowest_level(seconds, shares, 64) == pytest.approx(4.0)


def test_ranks_that_draw_for_themselves_keep_less_of_the_bound(result: Path) -> None:
    kept = computed(json.loads(result.read_text())["cases"][0], "fp32")["share_of_bound_kept"]
    assert kept["1"]["ours, one"] == pytest.approx(kept["64"]["ours, one"])
    assert kept["64"]["themselves, one level a step"] < kept["1"]["themselves, one level a step"]


@pytest.mark.slow
def test_two_ranks_are_measured(result: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    done = run_module(
        "benchmarks.ranks", "--steps", result, "--measure", "--resolutions", 16, "--turns", 2, "--out", out
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [case["ranks"] for case in found["measured"]] == [1, 2]
    for case in found["measured"]:
        assert list(case["share_of_bound_kept"]) == list(found["computed"][0]["share_of_bound_kept"]["1"])
    assert len(found["ratios"]) == 2 * 4
    assert found["ratios"].keys() == found["spreads"].keys()
    assert all(value > 0 for value in found["ratios"].values())


def test_works_take_turns_and_memory_is_that_of_the_work() -> None:
    order: list[str] = []
    works = [lambda: order.append("a"), lambda: order.append("b")]
    assert len(take_turns(works, 2, torch.device("cpu"), "test")) == 2
    assert order == ["a", "b"] * 3
    assert list(in_turns([lambda: len(order), lambda: 1], 2, "test", warm_up=0)) == [(6, 1), (6, 1)]
    taken = peak_memory(lambda: torch.ones(64 * 2**20).sum().item(), torch.device("cpu"))
    assert 200 * 2**20 < taken < 400 * 2**20


def test_the_price_of_recomputing_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "activation_checkpointing.json"
    done = run_module("benchmarks.activation_checkpointing", "--resolutions", 16, "--turns", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert case["time_ratio"] == case["seconds"][1] / case["seconds"][0]
    assert len(case["memory_gib"]) == 2


@pytest.mark.slow
def test_the_same_training_in_both_precisions_is_compared_and_drawn(tmp_path: Path) -> None:
    tree = {
        "dataset": {"resolution": 16},
        "settings": {"small": {"process": "dvdp", "turning_points": [500]}},
        "model": {
            "model_channels": 8,
            "channel_mult": [1, 2],
            "attention_factors": [],
            "num_head_channels": 8,
            "num_classes": 10,
        },
        "training": {"budget": "images", "batch": 16, "warmup_images": 16, "preview_steps": 4},
        "sampling": {"count": 16, "steps": 4},
        "evaluation": {"samples": 16, "kid_subset": 8, "extractor_epochs": 1},
    }
    params, out, picture = (tmp_path / name for name in ("params.yaml", "precision.json", "precision.png"))
    params.write_text(yaml.safe_dump(tree))
    arguments = ("--params", params, "--images", 640, "--work", tmp_path / "work", "--out", out, "--picture", picture)
    done = run_module("benchmarks.precision", *arguments)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert len(case["fp32"]["loss"]) == len(case["bf16"]["loss"]) == 20
    assert 0 < case["mean_difference"] <= case["largest_difference"] < 0.1, "they start from the same seed"
    assert picture.stat().st_size > 10_000


def test_throughput_is_marked_where_it_is_not_the_protocols(tmp_path: Path) -> None:
    path = tmp_path / "throughput.json"
    common = ["benchmarks.throughput", "--toy", "--resolution", 32, "--batches", 2, "--steps", 3, "--out", path]
    done = run_module(*common, "--levels", "all", "--iterations", 2)
    assert done.returncode == 0, done.stderr
    assert "**Shortened, not the protocol**: 2 of 4,000 iterations, 2 of 100 batches, 3 of 1,000 steps." in done.stdout
    record = json.loads(path.read_text())
    assert record["shortened"] is True
    assert record["done"] == {"iterations": 2, "batches": 2, "steps": 3}
    assert (record["precision"], record["mode"]) == ("bf16", "eager")
    for kind, unit in (("training", "iteration"), ("sampling", "sample")):
        for name in ("ddpm", "dvdp"):
            found = record[kind][name]
            assert found[f"seconds_per_{unit}"] > 0
            peak = max(record["peak_tflops"].values())
            assert found["share_of_peak"] == pytest.approx(found["tflops_per_second"] / peak)
        ratio = f"16 px, bf16, eager, levels: all, {kind}, DDPM over DVDP"
        assert record["ratios"][ratio] == record[kind]["ddpm_over_dvdp"]
        assert record["spreads"][ratio] >= 0
    whole = throughput.table({**record, "done": throughput.PROTOCOL, "shortened": False})
    assert "The whole protocol: 4,000 of 4,000 iterations, 100 of 100 batches, 1,000 of 1,000 steps." in whole
    done = run_module(*common, "--levels", "one", "--iterations", 150)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("--iterations: found 150, expected a multiple of 100")


def test_times_are_kept_turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "seconds", lambda work, device: work())
    taken = iter([1.0, 30.0, 2.0, 10.0])
    works = [lambda: next(taken), lambda: next(taken)]
    found = [list(times) for times in throughput.times_so_far(works, 2, "test", torch.device("cpu"))]
    assert found == [[(1.0, 30.0)], [(1.0, 30.0), (2.0, 10.0)]]


@pytest.mark.slow
def test_larger_batches_in_parts_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "level_batch.json"
    done = run_module("benchmarks.level_batch", "--resolutions", 16, "--turns", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for case in found["cases"]:
        seconds = case["seconds"]
        assert seconds.keys() == case["memory_gib"].keys()
        for parts in (1, 4):
            one = sum(share * seconds[f"level {k}, {parts}"] for k, share in enumerate((0.3, 0.3, 0.4)))
            name = f"16 px, {case['precision']}, training, DDPM over DVDP, one level a step, {parts} x 10 images"
            assert found["ratios"][name] == pytest.approx(seconds[f"ddpm, {parts}"] / one)
            name = f"16 px, {case['precision']}, training, DDPM over DVDP, all levels a step, {parts} x 10 images"
            assert found["ratios"][name] == seconds[f"ddpm, {parts}"] / seconds[f"all levels, {parts}"]
            assert f"| 16 | {case['precision']} | {parts} x 10 | {found['ratios'][name]:.2f}x |" in done.stdout
    assert compare(found, found).startswith("None of 8 ratios")


def test_loading_is_measured_beside_an_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVDP_TEST_DATA", raising=False)
    path = tmp_path / "loading.json"
    small = ["--count", 3, "--batch", 2, "--turns", 1, "--seconds", 0.01]
    done = run_module("benchmarks.loading", *small, "--out", path)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert (found["images"], found["page_cache"]) == ("synthetic", "warm")
    names = [way["name"] for way in found["ways"]]
    assert [name for name in names if name.startswith("ours")] == ["ours, raw", "ours, png", "ours, jpeg"]
    assert len(names) == 7
    for way in found["ways"]:
        assert way["workers"] == [0, 1]
        assert all(rate > 0 for rate in way["images_per_second_and_core"])
        assert f"| {way['name']} |" in done.stdout
    assert found["ratios"].keys() == found["spreads"].keys()
    assert len(found["ratios"]) == 3 * 4 * 2
