"""What settings cost, each number against one that is worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvdp.config import parse_params
from dvdp.files import write_atomically
from dvdp.models.flops import network_flops
from dvdp.models.unet import build_network
from pipelines.jobs.device import Machine, read_machine, write_machine
from pipelines.jobs.job import Job
from pipelines.reports.comparison import Result
from pipelines.reports.costs import budget, costs, total
from tests.reports.test_comparison import PARAMS, RECORD, results, warm

SCORES = {"ddpm": (4.0, 6.0), "dvdp": (3.0, 3.0)}


def log(result: Result, *entries: tuple[int, float, float]) -> None:
    """Images seen, images a second since the entry before, GiB of the worker; and 4 samples in 2 s."""
    result.job.samples.mkdir(parents=True, exist_ok=True)
    np.save(result.job.samples / "00000000.npy", np.zeros((4, 3, 32, 32), np.uint8))
    write_atomically(result.job.samples / "00000000.seconds", "2.0")
    lines = [
        {"images": images, "time": 1.0, "metrics": {"images_per_second": rate, "memory_gib": gib}}
        for images, rate, gib in entries
    ]
    write_atomically(result.job.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def test_every_number_is_that_of_log_files_and_network(tmp_path: Path) -> None:
    ddpm = results(tmp_path, SCORES)[0]
    folder, run = ddpm.job.folder, ddpm.job.run
    log(ddpm, (6000, 50.0, 1.0), (12000, 100.0, 1.25))
    write_atomically(folder / "checkpoints" / "000000012000.safetensors", bytes(10 * 2**20))
    # Beside the samples that are there, an array of 4 x 3 x 32 x 32 bytes.
    said = {"images": 12000, "flops": 1.0, "seconds": 75.0, "memory_bytes": 3 << 29, "disk_bytes": 20 << 20}
    write_atomically(folder / "estimate.json", json.dumps(said))
    write_atomically(folder / "machine.json", json.dumps(vars(Machine("a CPU", False, 2))))
    headings, (cells,) = costs([ddpm])
    found = dict(zip(headings, cells, strict=True))

    weights = sum(parameter.numel() for parameter in build_network(run.model, 0).parameters())
    forward = network_flops(run.model, 32)
    assert (weights, forward) == (795_315, 213_223_424)
    assert found["parameters"] == "795 k"
    assert found["FLOPs of a training image"] == "640 M", "3 times 213 M"
    assert found["training FLOPs"] == "11.5 T", "17,984 images, 562 batches of 32"
    assert found["FLOPs of a sample"] == "21.3 G", "100 steps"
    # 120 s and 60 s on 2 cores, beside 75 s on 2 cores.
    assert found["training, core-minutes (estimated)"] == "6.00 (2.50)"
    # 4 images in 2 s: 256 take 128 s on the one core that a worker has.
    assert found["samples a second"] == "2.00"
    assert found["sampling, core-minutes"] == "2.13"
    assert found["peak memory, GiB (estimated)"] == "1.25 (1.50)"
    assert found["disk, MiB (estimated)"] == "10.0 (20.0)"
    assert total([ddpm]) == (
        "The run took 6.00 core-minutes of training and 2.13 of sampling, 11.5 TFLOPs of training and 10.0 MiB of disk,"
        " on a CPU."
    )


def test_a_setting_costs_the_mean_of_its_seeds_and_hours_of_gpus_are_called_so(tmp_path: Path) -> None:
    first, second, *_ = results(tmp_path, SCORES)
    for result, rate in ((first, 1.0), (second, 3.0)):
        log(result, (10_800, rate, 0.5))
        write_atomically(result.job.folder / "machine.json", json.dumps(vars(Machine("a GPU", True, 4))))
    headings, (cells,) = costs([first, second])
    found = dict(zip(headings, cells, strict=True))
    assert found["training, GPU-hours (estimated)"] == "8.00", "12 and 4, without an estimate"
    assert total([first, second]).startswith("2 runs took 16.0 GPU-hours of training and ")


@pytest.mark.parametrize(
    ("training", "override", "sentence"),
    [
        (
            {},
            {},
            "All settings were trained on equal FLOPs, 11.5 TFLOPs each (training.budget: flops); as batches are whole,"
            " the most is 0.12 % more than the least.",
        ),
        (
            {"budget": "images"},
            {},
            "All settings were trained on equal images, 17,984 each (training.budget: images); the most is 2.11 times"
            " the least FLOPs.",
        ),
        (
            {},
            {"training": {"images": 36_000}},
            "Settings were trained neither on equal FLOPs nor on equal images, as their own overrides say: the most is"
            " 2.00 times the least FLOPs, and 4.23 times the fewest images.",
        ),
    ],
)
def test_a_sentence_says_what_settings_had_in_common(
    training: dict[str, Any], override: dict[str, Any], sentence: str
) -> None:
    settings = {**PARAMS["settings"], "dvdp": {**PARAMS["settings"]["dvdp"], "overrides": override}}
    params = parse_params({**PARAMS, "settings": settings, "training": {**PARAMS["training"], **training}})
    assert budget([Result(Job(params, run, "digest"), RECORD) for run in params.runs()]) == sentence


def test_flops_before_a_start_are_told_apart(tmp_path: Path) -> None:
    found = [r if r.job.run.process == "ddpm" else warm(r) for r in results(tmp_path, SCORES)]
    for result in found:
        log(result, (12000, 100.0, 1.25))
    headings, cells = costs(found)
    assert headings[3] == "training FLOPs before"
    assert [line[2:4] for line in cells] == [["11.5 T", "0"], ["11.5 T", "5.00 T"]]
    assert total(found).count("46.0 TFLOPs of training") == 1, "of these four runs alone"
    assert budget(found) == (
        "ddpm was trained on 17,984 images, 11.5 TFLOPs. dvdp started from weights that had seen 9,000 images, 5.00e+12"
        " FLOPs before, which no number here counts: they do not compare at equal training with others."
    )
    both = budget([warm(result) for result in results(tmp_path, SCORES)])
    assert both.startswith("All settings were trained on equal FLOPs, 11.5 TFLOPs each")
    assert "ddpm and dvdp started from weights that had seen 9,000 images" in both


def test_a_run_says_what_it_was_trained_on(tmp_path: Path) -> None:
    job = results(tmp_path, SCORES)[0].job
    assert read_machine(job) == Machine("", False, 1), "a run of an older release"
    write_machine(job.folder, gpu=False, devices=3)
    machine = read_machine(job)
    assert (machine.gpu, machine.devices) == (False, 3)
    assert all((machine.device, machine.dvdp, machine.torch, machine.python))
