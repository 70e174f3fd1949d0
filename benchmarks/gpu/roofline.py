"""Seconds of training and sampling on one H200, predicted from counts: a model of the machine, until one is measured.

    python -m benchmarks.gpu.roofline    # benchmarks/results/gpu_roofline.json and the docs anew from gpu_counts.json

A kernel takes as long as its bytes or its FLOPs, whichever is longer, and at least :data:`SHORTEST_KERNEL`. A piece of
work takes as long as its kernels one after the other (bound by the GPU), or as the host takes to launch them and the
CUDA graphs of a training step's parts (bound by the host). If graphs launched all, it would take its kernels' time.
Compiled code is not predicted. All constants are assumptions; :mod:`benchmarks.gpu.lease` measures what is predicted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.kernels import Kernel
from dvdp.diffusion.spans import level_shares
from dvdp.files import write_atomically

_RESULTS = Path(__file__).resolve().parents[1] / "results"
COUNTS, ROOFLINE = _RESULTS / "gpu_counts.json", _RESULTS / "gpu_roofline.json"
#: Bytes a second that kernels reach: 83 % of the data sheet's 4.8 TB/s.
BANDWIDTH = 4.0e12
#: FLOPs a second: of large bf16 convolutions (61 % of the dense peak), of fp32 ones as TF32, and of fp32 products,
#: which torch does not run as TF32 by default.
BF16, TF32, FP32 = 600e12, 300e12, 50e12
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
#: Seconds that a kernel takes on the GPU, however small, and that the host takes to launch one in eager mode.
SHORTEST_KERNEL, HOST = 3e-6, 7e-6
STEPS = 1000
DOCS = _RESULTS.parents[1] / "docs/performance.md"
BEGIN, END = "<!-- roofline: begin, made by benchmarks.gpu.roofline -->", "<!-- roofline: end -->"


def kernel_seconds(kernel: Kernel) -> float:
    """On the GPU."""
    low = kernel.dtype in (torch.bfloat16, torch.float16)
    rate = BF16 if low else FP32 if kernel.operator in PRODUCTS else TF32
    moved = (kernel.read + kernel.written) / BANDWIDTH
    return max(moved, kernel.flops / rate, kernel.launches * SHORTEST_KERNEL)


def predict(part: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step or of a sampler call, from its counts."""
    on_gpu, on_host = part["gpu_milliseconds"] / 1e3, part["launches"] * HOST
    seconds = max(on_gpu, on_host)
    return {
        "seconds": _short(seconds),
        "bound_by": "host" if on_host > on_gpu else "GPU",
        "seconds_graphed": _short(on_gpu),
        "tflops_per_second": _short(part["teraflops"] / seconds),
    }


def roofline(record: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions for every network of :mod:`benchmarks.gpu.counts`: of each part, and of what they amount to."""
    networks = {}
    for name, network in record["networks"].items():
        parts = {part: predict(counted) for part, counted in network["parts"].items()}
        networks[name] = {"parts": parts, **_whole(network, parts)}
    assumptions = {
        "bytes_per_second": BANDWIDTH,
        "flops_per_second": {"bf16": BF16, "fp32 convolutions, as TF32": TF32, "fp32 products": FP32},
        "seconds_of_a_kernel_at_least": SHORTEST_KERNEL,
        "seconds_of_the_host_per_launch": HOST,
    }
    return {"machine": "one H200, assumed", "assumptions": assumptions, "networks": networks}


def _whole(network: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """An iteration of one level a step, the mean over the levels' shares; a step of DDPM is one of level 0."""
    shares = level_shares(network["turning_points"], STEPS)
    found: dict[str, Any] = {}
    for suffix in ("", "_graphed"):
        steps, calls = (
            [parts[f"{kind}, level {level}"][f"seconds{suffix}"] for level in range(len(shares))]
            for kind in ("step", "sampler call")
        )
        iteration, call = (sum(map(float.__mul__, shares, seconds)) for seconds in (steps, calls))
        found[f"iteration_seconds{suffix}"] = _short(iteration)
        found[f"training_ddpm_over_dvdp{suffix}"] = _short(steps[0] / iteration)
        found[f"seconds_of_an_image_of_1000_steps{suffix}"] = _short(STEPS * call / network["sampled"])
        found[f"sampling_ddpm_over_dvdp{suffix}"] = _short(calls[0] / call)
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def table(record: Mapping[str, Any]) -> str:
    """Counts and predictions in Markdown."""
    lines = [
        "| network | step of level 0 | launches, all levels | iteration, s | DDPM over DVDP | 1,000-step image, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in roofline(record)["networks"].items():
        counted, level_0 = record["networks"][name], found["parts"]["step, level 0"]
        step, every = (counted["parts"][f"step, {levels}"] for levels in ("level 0", "all levels"))
        cells = [
            f"{name}, batch {counted['batch']}, {counted['optimizer']}",
            f"{step['launches']:,} launches, {step['gigabytes']:.3g} GB, {level_0['seconds']:.3g} s"
            f" ({level_0['bound_by']}), {level_0['tflops_per_second']:.3g} TFLOP/s",
            f"{every['launches']:,}",
        ]
        for key in ("iteration_seconds", "training_ddpm_over_dvdp", "seconds_of_an_image_of_1000_steps"):
            now, graphed = f"{found[key]:.3g}", f"{found[f'{key}_graphed']:.3g}"
            cells.append(now if now == graphed else f"{now}, all graphed {graphed}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def put_in(page: str, text: str) -> str:
    """A page with another table between its marks."""
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)


def write_roofline(record: Mapping[str, Any]) -> None:
    """From a record of counts: the predictions, and the table in the docs."""
    write_atomically(ROOFLINE, json.dumps(roofline(record), indent=2) + "\n")
    write_atomically(DOCS, put_in(DOCS.read_text(), table(record)))


def main() -> int:
    """Predict from the committed counts."""
    write_roofline(json.loads(COUNTS.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
