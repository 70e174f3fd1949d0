"""The guard of counts: a step and a sampler call do no more on a GPU than their baseline says."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks.gpu import counts, roofline
from benchmarks.gpu.roofline import COUNTS, ROOFLINE
from dvdp.errors import UserError

BASELINE: dict[str, Any] = json.loads(COUNTS.read_text())
SAME_TORCH = pytest.mark.skipif(
    BASELINE["torch"] != counts.torch_release(),
    reason=f"the baseline was counted with torch {BASELINE['torch']}, and other releases take other kernels",
)


@SAME_TORCH
@pytest.mark.parametrize("name", list(BASELINE["networks"]))
def test_a_step_and_a_sampler_call_do_no_more_than_the_baseline_says(name: str) -> None:
    found = {name: counts.count(counts.networks()[name], each_level=False)}
    assert str(counts.compare(found, BASELINE["networks"])) == "As the baseline says."


def test_nothing_is_copied_to_the_host_and_nothing_is_waited_for() -> None:
    for name, network in BASELINE["networks"].items():
        for part, found in network["parts"].items():
            assert (found["copies_to_host"], found["waits"]) == (0, 0), (name, part)


def changed(total: str, factor: float) -> dict[str, Any]:
    """The baseline, with other convolutions in the demo's step of all levels."""
    networks = copy.deepcopy(BASELINE["networks"])
    part = networks["demo"]["parts"]["step, all levels"]
    part[total] = part[total] * factor + (factor > 1)
    row = next(name for name in part["by"] if "ResidualBlock.forward: convolution, b" in name)
    part["by"][row] = [value * factor for value in part["by"][row]]
    return networks


@pytest.mark.parametrize("total", ["launches", "gigabytes", "teraflops"])
def test_more_of_anything_is_named_with_its_function_and_operator(total: str) -> None:
    first, second = counts.compare(changed(total, 1.01), BASELINE["networks"]).grown
    assert first.startswith(f"demo, step, all levels: {total} ")
    assert second.strip().startswith("dvdp/models/unet.py ResidualBlock.forward: convolution, b")


def test_a_new_copy_to_the_host_is_named() -> None:
    networks = copy.deepcopy(BASELINE["networks"])
    part = networks["demo"]["parts"]["sampler call, level 0"]
    part["copies_to_host"], part["host"] = 1, {"dvdp/diffusion/sampling.py sample: copy to the host": 1}
    changes = counts.compare(networks, BASELINE["networks"])
    assert changes.grown == [
        "demo, sampler call, level 0: copies_to_host 0 -> 1",
        "    dvdp/diffusion/sampling.py sample: copy to the host: 0 -> 1",
    ]
    assert counts.REWRITE in str(changes)


def test_fewer_of_anything_asks_for_a_new_baseline() -> None:
    changes = counts.compare(changed("launches", 0.9), BASELINE["networks"])
    assert changes == ([], ["demo, step, all levels"])
    assert counts.REWRITE in str(changes)
    assert counts.compare(changed("gigabytes", 0.999), BASELINE["networks"]) == ([], [])


def test_a_network_without_a_baseline_is_refused() -> None:
    with pytest.raises(UserError, match=r"new, step, level 0: found no baseline.*--write"):
        counts.compare({"new": BASELINE["networks"]["demo"]}, BASELINE["networks"])


def test_the_committed_roofline_follows_from_the_counts() -> None:
    assert json.loads(ROOFLINE.read_text()) == json.loads(json.dumps(roofline.roofline(BASELINE)))
    page = roofline.DOCS.read_text()
    assert roofline.put_in(page, roofline.table(BASELINE)) == page


def test_a_part_takes_as_long_as_the_slower_of_gpu_and_host() -> None:
    on_gpu = roofline.predict({"gpu_milliseconds": 50.0, "launches": 1000, "teraflops": 10.0})
    assert (on_gpu["seconds"], on_gpu["bound_by"], on_gpu["tflops_per_second"]) == (0.05, "GPU", 200.0)
    on_host = roofline.predict({"gpu_milliseconds": 5.0, "launches": 1000, "teraflops": 1.0})
    assert (on_host["seconds"], on_host["bound_by"], on_host["seconds_graphed"]) == (0.007, "host", 0.005)


def test_an_iteration_is_the_mean_over_the_levels_shares() -> None:
    found = json.loads(ROOFLINE.read_text())["networks"]["256 px"]
    steps = [found["parts"][f"step, level {level}"]["seconds"] for level in range(3)]
    iteration = 0.3 * steps[0] + 0.3 * steps[1] + 0.4 * steps[2]
    assert found["iteration_seconds"] == pytest.approx(iteration, rel=1e-3)
    assert found["training_ddpm_over_dvdp"] == pytest.approx(steps[0] / iteration, rel=1e-3)
