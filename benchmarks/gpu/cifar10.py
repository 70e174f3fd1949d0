"""DDPM, DVDP {600} and DVDP with an earlier turning point on one GPU: equal FLOPs, for as long as there is.

    python3 -m benchmarks.gpu.cifar10 --images cifar10.npz --seconds 500 --out cifar10

``--images`` is an .npz with ``images`` and perhaps ``labels``, or an .npy: uint8 (n, 3, side, side) or (n, side, side,
3). The time is shared out after a few steps of each setting have been timed: all see the same training FLOPs, then
samples are drawn and scored with this project's own feature network, trained on the same images: Frechet distances
(``fd_labels``, or ``fd_rotation`` without labels), which compare with each other and nothing else. Leaves
``result.json`` and a small picture of samples for each setting, as soon as it is there.

Runs from a bare checkout with torch, numpy, pillow, pyyaml, safetensors and tqdm. With ``--toy`` it takes seconds on a
CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.steps import make_run, start
from benchmarks.timing import clock
from dvdp.config import ModelParams, Run, TrainingParams
from dvdp.data.loading import ArrayImages
from dvdp.errors import UserError
from dvdp.evaluation.extractors import FILE, FeatureNetwork, Task, load_network, train_extractor
from dvdp.evaluation.figures import grid, save_png
from dvdp.files import write_atomically
from dvdp.models.denoiser import NetworkDenoiser
from dvdp.pixels import to_uint8
from dvdp.randomness import generator
from dvdp.sampling import sample
from dvdp.training.budget import mean_flops
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

SETTINGS: dict[str, tuple[int, ...]] = {"ddpm": (), "dvdp-600": (600,), "dvdp-400": (400,)}
MODEL = ModelParams(
    predicts="velocity", channels=96, multipliers=(1, 2, 2), blocks=2, attention=(2, 4), head_channels=32
)
TRAINING = TrainingParams(
    budget="images", batch=512, precision="bf16", learning_rate=1e-3, cooldown=0.5, warmup_images=50_000
)
TOY_MODEL = replace(MODEL, channels=8, multipliers=(1, 2), blocks=1, attention=(2,), head_channels=8)
#: Of the time for training and sampling together: the rest is for the feature network and to be safe.
TRAINING_SHARE, SAMPLING_SHARE = 0.6, 0.2
#: Timed of each setting before the time is shared out, after as many to warm up.
TRIAL_STEPS = 5


def main() -> int:
    """Train, sample and score each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything")
    parser.add_argument("--samples", type=int, default=5000, help="of each setting, at most; fewer if time is short")
    parser.add_argument("--sample-steps", type=int, default=100)
    parser.add_argument("--extractor-epochs", type=int, default=3)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        run_all(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run_all(options: argparse.Namespace) -> None:
    """What :func:`main` was asked for."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, labels = read_images(options.images)
    torch.backends.cudnn.benchmark = True
    model = TOY_MODEL if options.toy else MODEL
    settings = replace(TRAINING, batch=16, warmup_images=64, ema_halflife_images=200) if options.toy else TRAINING
    task: Task = "rotation" if labels is None else "labels"
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:12]
    info = train_extractor(ArrayImages(pixels, labels), task, options.extractor_epochs, digest, options.out)
    features = load_network(options.out / FILE)[0].to(device)
    data = torch.from_numpy(pixels).to(device)
    real = describe(features, data)
    halves = [describe(features, data[i::2]) for i in (0, 1)]

    runs = {name: make_run(points, pixels.shape[-1], model, settings) for name, points in SETTINGS.items()}
    costs = {name: 3 * mean_flops(run) for name, run in runs.items()}
    paces = {name: trial(run, data) for name, run in runs.items()}
    left = max(0.0, options.seconds - (time.perf_counter() - began))
    # Seconds a FLOP of each setting, added up: what all of them need for one FLOP each.
    flops = left * TRAINING_SHARE / sum(paces[name] / costs[name] for name in runs)
    # All take a step at least, whatever is left.
    flops = max(flops, settings.batch * max(costs.values()))
    result: dict[str, Any] = {
        "machine": machine(),
        "images": {"count": len(pixels), "digest": digest},
        "extractor": {"task": task, "epochs": info.epochs, "accuracy": info.accuracy},
        f"fd_{task} of two halves of the images": frechet(*halves),
        "training_flops_of_each": flops,
        "sample_steps": options.sample_steps,
        "settings": {},
    }
    for name, run in runs.items():
        images = max(1, round(flops / costs[name] / settings.batch)) * settings.batch
        trained = replace(run, training=replace(run.training, images=images))
        trained_from = time.perf_counter()
        training = start(trained, pixels[:1], device)
        train(training, data, name)
        seconds = clock(device) - trained_from
        samples = draw(training, options, left * SAMPLING_SHARE / len(runs), name)
        result["settings"][name] = {
            "turning_points": run.turning_points,
            "images": images,
            "flops": images * costs[name],
            "training_seconds": seconds,
            "training_tflops_per_second": images * costs[name] / seconds / 1e12,
            "samples": len(samples),
            f"fd_{task}": frechet(describe(features, samples), real),
        }
        save_png(grid(samples[:64], columns=8, scale=1), options.out / f"{name}.png")
        write_atomically(options.out / "result.json", json.dumps(result, indent=2) + "\n")
    result["seconds"] = time.perf_counter() - began
    write_atomically(options.out / "result.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def read_images(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
    """uint8 (n, 3, side, side) and labels, from an .npz or .npy.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        content = np.load(path, allow_pickle=False)
        images, labels = (
            (content["images"], content.get("labels")) if isinstance(content, np.lib.npyio.NpzFile) else (content, None)
        )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"--images: cannot read '{path}' ({error}), expected an .npz with 'images' or an .npy; write it with numpy."
        ) from None
    if images.ndim == 4 and images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    ArrayImages(images, labels)
    return np.ascontiguousarray(images), labels


def train(training: Training, data: Tensor, title: str) -> None:
    """To the run's end, on images drawn at random and mirrored at random; all of it on the device."""
    batch, source = training.run.training.batch, generator(training.run.seed, "batches", device=data.device)
    steps = training.total // batch
    for step in tqdm(range(steps), desc=title, unit="step", disable=None):
        chosen = data[torch.randint(len(data), (batch,), device=data.device, generator=source)]
        mirror = torch.rand(batch, 1, 1, 1, device=data.device, generator=source) < 0.5
        training.step(step, torch.where(mirror, chosen.flip(3), chosen))
        training.ema.update((step + 1) * batch, batch)


def trial(run: Run, data: Tensor) -> float:
    """Seconds an image of training, over the levels."""
    training = start(run, data[:1].cpu().numpy(), data.device)
    batch = run.training.batch
    images = data[torch.arange(batch, device=data.device) % len(data)]
    # The spread of the next steps differs by an image here and there.
    spreads = [level_counts(training.process.schedule, "all", 0, step, batch) for step in range(TRIAL_STEPS)]
    began = 0.0
    for turn in range(2):
        began = clock(data.device)
        for counts in spreads:
            training.update(images, counts)
            training.ema.update((turn + 1) * batch, batch)
    return (clock(data.device) - began) / TRIAL_STEPS / batch


def draw(training: Training, options: argparse.Namespace, seconds: float, title: str) -> Tensor:
    """Samples, uint8, from the averaged weights: batch after batch until the time or the number is reached."""
    run, began = training.run, time.perf_counter()
    parts: list[Tensor] = []
    size = min(options.samples, 16 if options.toy else 1000)
    denoiser = NetworkDenoiser(training.ema.network, training.process, run.side, run.model.predicts)
    with tqdm(total=options.samples, desc=f"{title}, samples", unit="image", disable=None) as bar:
        for first in range(0, options.samples, size):
            if parts and time.perf_counter() - began > seconds:
                break
            count = min(size, options.samples - first)
            with torch.autocast(training.device.type, torch.bfloat16):
                images = sample(
                    training.process,
                    denoiser,
                    (count, 3, run.side, run.side),
                    steps=options.sample_steps,
                    first=first,
                    device=training.device,
                )
            parts.append(to_uint8(images))
            bar.update(count)
    return torch.cat(parts)


@torch.inference_mode()
def describe(features: FeatureNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the features of uint8 images, float64."""
    found = torch.cat([features.features(part).double() for part in images.split(500)])
    return found.mean(0), found.T.cov()


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Frechet distance of two normal distributions, each (mean, covariance), where torch-fidelity is not installed."""
    # The eigenvalues of a product of covariances are real and not negative, but for rounding.
    root = torch.linalg.eigvals(a[1] @ b[1]).real.clamp(min=0).sqrt().sum()
    distance = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * root
    return max(0.0, distance.item())


if __name__ == "__main__":
    sys.exit(main())
