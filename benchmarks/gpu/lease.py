"""All that a few minutes of a GPU are wanted for, in the order of its worth, beside what was predicted.

    python3 -m benchmarks.gpu.lease --seconds 540 --images images.tar.xz --extractor extractor.safetensors --out D
    python3 -m benchmarks.gpu.lease --toy --seconds 60 --out D    # on a CPU, to see that it runs

Parts, each with a share of the seconds and with what the parts before it left of theirs:

- *compiled*: steps of DDPM and DVDP at 256 px with ``training.compile``, 24 images, bf16; then samples, 64 at a time;
- *eager*: the same without a compiler, which tells whether the roofline is right, as its counts are of eager mode;
- *training*: DDPM, DVDP {600} and {400} at 32 px on equal FLOPs, with a score (:mod:`benchmarks.gpu.equal_flops`), on
  ``--images``: an .npz with ``images`` and perhaps ``labels``, or an .npy: uint8 (n, 3, side, side) or (n, side, side,
  3); or a folder, tar or zip of image files, of which those below a folder ``train`` are taken where there is one, with
  their folders as labels.

Everything measured is written to ``D/lease.json`` at once, beside the prediction of ``results/gpu_roofline.json``: for
eager mode the slower of GPU and host, for compiled mode the GPU's time for the kernels of eager mode. A part that fails
says why there, and the next begins. The script ends by itself when the seconds are over. It runs from a bare checkout
with torch, numpy, pillow, pydantic, ruamel.yaml, safetensors and tqdm.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.equal_flops import compare_settings
from benchmarks.gpu.roofline import ROOFLINE
from benchmarks.gpu.steps import (
    PAPER,
    REPEATS,
    SAMPLE_STEPS,
    TimeIsUp,
    goals,
    limited,
    measure,
    sampling_works,
    summary,
    training_works,
)
from benchmarks.machine import machine
from benchmarks.steps import TOY, make_run, start
from benchmarks.timing import peak_tflops
from dvdp.config import TrainingParams
from dvdp.diffusion.timesteps import share_steps
from dvdp.errors import UserError
from dvdp.files import write_atomically

#: Of the seconds, until the end of each part.
PARTS = {"compiled": 0.58, "eager": 0.68, "training": 1.0}
RESOLUTION, TURNS = 256, 3


def main() -> int:
    """Measure part by part, and write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--images", type=Path, help="of the part 'training', which is left out without them")
    parser.add_argument("--extractor", type=Path, help="a feature network trained before")
    parser.add_argument("--extractor-epochs", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="tiny networks, nothing compiled")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    if options.images is None and "training" in options.parts:
        options.parts.remove("training")
        print("--images: found none, so the part 'training' is left out; give images of one square size.", flush=True)
    try:
        run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """What :func:`main` was asked for.

    Raises:
        UserError: after all parts: what was given cannot be used.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    record: dict[str, Any] = {"machine": machine(), "seconds_given": options.seconds, "toy": options.toy}
    record["parts"] = {part: {"complete": False} for part in options.parts}
    keep = partial(write, record, options.out / "lease.json", began)
    keep()
    record["peak_tflops"] = peak_tflops("bf16", device)
    keep()
    refused: UserError | None = None
    for part in options.parts:
        # Without the parts that were not asked for, all have more.
        end = options.seconds * PARTS[part] / max(PARTS[each] for each in options.parts)
        time_left, about = began + end - time.perf_counter(), record["parts"][part]
        try:
            with limited(time_left):
                if part == "training":
                    score(options, time_left, about, keep)
                else:
                    measure_steps(part == "compiled", options.toy, device, record, about, keep)
            about["complete"] = True
        except TimeIsUp:
            print(f"{part}: its seconds are over; what was measured is kept.", flush=True)
        except UserError as error:
            refused, about["error"] = error, str(error)
        except Exception as error:  # Whatever a GPU, a driver or a compiler fails with: others may do.
            about["error"] = f"{type(error).__name__}: {error}"
            print(f"{part}: {about['error']}", file=sys.stderr, flush=True)
        keep()
    if refused is not None:
        raise refused


def write(record: dict[str, Any], path: Path, began: float) -> None:
    """The record as it is, with the seconds since ``began``."""
    record["seconds"] = time.perf_counter() - began
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def measure_steps(
    compiled: bool,
    toy: bool,
    device: torch.device,
    record: Mapping[str, Any],
    about: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Steps, then samples, at the paper's protocol, each kept at once; with a summary and the goals.

    Args:
        about: of the part; what is measured goes there.
    """
    resolution, repeats, (batch, sampled, points, model) = RESOLUTION, REPEATS, PAPER[RESOLUTION]
    if toy:
        (resolution, (batch, model)), repeats, sampled = next(iter(TOY.items())), 1, 2
    settings = TrainingParams(batch=batch, optimizer="adamw", precision="bf16", compile=compiled and not toy)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, resolution, resolution), dtype=np.uint8)
    runs = [make_run(at, resolution, model, settings) for at in ((), points)]
    ddpm, dvdp = (start(each, pixels, device) for each in runs)
    images = torch.from_numpy(pixels).to(device)
    works = training_works(ddpm, dvdp, images, repeats) | sampling_works(ddpm, dvdp, sampled)
    predicted = {} if toy else predictions(compiled)
    peak, shares = max(record["peak_tflops"].values()), dvdp.process.schedule.shares()
    about |= {"resolution": resolution, "training_batch": batch, "sampling_batch": sampled, "measured": {}}
    for name, work in works.items():
        found = measure(work, name, TURNS, peak, device)
        about["measured"][name] = found | {"predicted_seconds": predicted.get(name)}
        about["summary"] = summary(about["measured"], shares, sampled)
        if not toy:
            about["goals"] = goals(about["summary"])
        keep()
        said = f", predicted {predicted[name]:.4g} s" if name in predicted else ""
        print(
            f"{'compiled' if compiled else 'eager'}, {name}: {found['seconds']:.4g} s{said},"
            f" {found['tflops_per_second']:.3g} TFLOP/s; the first took {found['first_seconds']:.3g} s",
            flush=True,
        )


def predictions(compiled: bool) -> dict[str, float]:
    """Seconds of each work by the committed roofline."""
    network = json.loads(ROOFLINE.read_text())["networks"][f"{RESOLUTION} px"]
    parts = {name: part["seconds_graphed" if compiled else "seconds"] for name, part in network["parts"].items()}
    found = {name.replace("step,", "training,"): seconds for name, seconds in parts.items() if name.startswith("step,")}
    found["training, ddpm"] = found["training, level 0"]
    batch, _, points, model = PAPER[RESOLUTION]
    settings = TrainingParams(batch=batch, precision="bf16")
    for name, at in (("ddpm", ()), ("dvdp", points)):
        calls = share_steps(make_run(at, RESOLUTION, model, settings).build_schedule(), SAMPLE_STEPS)
        seconds = [number * parts[f"sampler call, level {level}"] for level, number in enumerate(calls)]
        found[f"sampling, {name}"] = sum(seconds)
    return found


def score(options: argparse.Namespace, time_left: float, about: dict[str, Any], keep: Callable[[], None]) -> None:
    """Settings trained on equal FLOPs, each kept at once."""

    def keep_result(result: dict[str, Any]) -> None:
        about.update(result)
        keep()

    given = (options.images, options.extractor, options.extractor_epochs)
    compare_settings(*given, time_left, options.out, options.toy, keep_result)


if __name__ == "__main__":
    sys.exit(main())
