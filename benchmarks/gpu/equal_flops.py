"""DDPM, DVDP {600} and DVDP with an earlier turning point trained on equal FLOPs and scored, in a given time.

The time is shared out after a few steps of each setting have been timed: all see the same training FLOPs, then samples
are drawn and scored with this project's own feature network: Frechet distances (``fd_labels``, or ``fd_rotation``
without labels), which compare with each other and nothing else. The network is trained on the same images, on the CPU,
unless it was before. Settings are trained as the demo trains them: by Muon, with all levels in a step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.steps import make_run, start
from benchmarks.timing import clock
from dvdp.config import ModelParams, TrainingParams
from dvdp.data.loading import ArrayImages
from dvdp.data.sources import UnreadableImageError, decode
from dvdp.data.sources.files import image_files
from dvdp.data.sources.formats import FORMATS
from dvdp.diffusion.randomness import generator
from dvdp.errors import UserError
from dvdp.evaluation.extractors import (
    FILE,
    ExtractorInfo,
    FeatureNetwork,
    Task,
    load_network,
    train_extractor,
)
from dvdp.evaluation.figures import grid, save_png
from dvdp.models.flops import mean_flops
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training

SETTINGS: dict[str, tuple[int, ...]] = {"ddpm": (), "dvdp-600": (600,), "dvdp-400": (400,)}
MODEL = ModelParams(
    prediction_type="v_prediction",
    model_channels=96,
    channel_mult=(1, 2, 2),
    num_res_blocks=2,
    attention_factors=(2, 4),
    num_head_channels=32,
    num_classes=0,
)
#: As params.yaml: with Muon and all levels in a step the demo scores best for its FLOPs (docs/study.md), and there are
#: few images here, too.
TRAINING = TrainingParams(
    budget="images",
    # Of which each level has a whole number: torch.compile, and cuDNN's choice of kernels, see one shape a level.
    batch=500,
    levels="all",
    optimizer="muon",
    precision="bf16",
    # Half of the demo's, whose network is a sixth as wide.
    learning_rate=1e-3,
    warmup_images=25_000,
    cooldown=0.7,
    ema_halflife_images=20_000,
)
TOY_MODEL = replace(
    MODEL, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,), num_head_channels=8
)
TOY_TRAINING = replace(TRAINING, batch=20, warmup_images=60, ema_halflife_images=200)
#: Of the time for training and sampling together: the rest is to be safe.
TRAINING_SHARE, SAMPLING_SHARE = 0.65, 0.2
#: Of a setting, and of one batch of them; fewer if time is short.
SAMPLES, SAMPLE_BATCH = 5000, 1000
SAMPLE_STEPS = 100
#: Called with a result so far.
Keep = Callable[[dict[str, Any]], None]
#: Timed of each setting before the time is shared out, after as many to warm up.
TRIAL_STEPS = 5


def compare_settings(
    images: Path, extractor: Path | None, epochs: int, time_left: float, out: Path, toy: bool, keep: Keep
) -> None:
    """Train, sample and score each setting; ``keep`` is given the whole result whenever one is done.

    Leaves in ``out`` a small picture of samples for each setting, and the feature network if it was trained here.

    Args:
        images: see :func:`read_images`.
        extractor: a feature network trained before.
        epochs: of the training of one, if there is none.
        time_left: seconds, for everything.
        toy: a tiny network for one step.

    Raises:
        UserError: images or network cannot be read, or do not belong together.
    """
    end = time.perf_counter() + time_left
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, labels = read_images(images)
    model, settings = (TOY_MODEL, TOY_TRAINING) if toy else (MODEL, TRAINING)
    most, steps = (16, 4) if toy else (SAMPLES, SAMPLE_STEPS)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:12]
    network, info = feature_network(extractor, epochs, out, pixels, labels, digest)
    features, score = network.to(device), f"fd_{info.task}"
    data = torch.from_numpy(pixels).to(device)
    real = describe(features, data)
    halves = [describe(features, data[i::2]) for i in (0, 1)]

    runs = {name: make_run(points, pixels.shape[-1], model, settings) for name, points in SETTINGS.items()}
    costs = {name: 3 * mean_flops(run) for name, run in runs.items()}
    trainings = {name: start(run, pixels[:1], device) for name, run in runs.items()}
    paces = {name: trial(training, data) for name, training in trainings.items()}
    left = max(0.0, end - time.perf_counter())
    # Seconds a FLOP of each setting, added up: what all of them need for one FLOP each.
    flops = 0.0 if toy else left * TRAINING_SHARE / sum(paces[name] / costs[name] for name in runs)
    # All take a step at least, whatever is left.
    flops = max(flops, settings.batch * max(costs.values()))
    result: dict[str, Any] = {
        "images": {"count": len(pixels), "digest": digest},
        "extractor": {"task": info.task, "epochs": info.epochs, "accuracy": info.accuracy, "data": info.data_digest},
        f"{score} of two halves of the images": frechet(*halves),
        "optimizer": settings.optimizer,
        "levels_of_a_step": settings.levels,
        "training_flops_of_each": flops,
        "sample_steps": steps,
        "seconds_until_training": time_left - left,
        "settings": {},
    }
    for name, training in trainings.items():
        count = max(1, round(flops / costs[name] / settings.batch)) * settings.batch
        training.total = count
        trained_from = clock(device)
        train(training, data, name)
        seconds = clock(device) - trained_from
        samples = draw(training, most, steps, left * SAMPLING_SHARE / len(runs), name)
        result["settings"][name] = {
            "turning_points": SETTINGS[name],
            "images": count,
            "flops": count * costs[name],
            "training_seconds": seconds,
            "training_tflops_per_second": count * costs[name] / seconds / 1e12,
            "samples": len(samples),
            score: frechet(describe(features, samples), real),
        }
        save_png(grid(samples[:64], columns=8, scale=1), out / f"{name}.png")
        keep(result)


def feature_network(
    extractor: Path | None,
    epochs: int,
    out: Path,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.integer] | None,
    digest: str,
) -> tuple[FeatureNetwork, ExtractorInfo]:
    """The one of ``--extractor``, or one trained on the images.

    Raises:
        UserError: the file is none, or of images of another resolution.
    """
    if extractor is None:
        task: Task = "rotation" if labels is None else "labels"
        train_extractor(ArrayImages(pixels, labels), task, epochs, digest, out)
        return load_network(out / FILE)
    network, info = load_network(extractor)
    if info.resolution != pixels.shape[-1]:
        raise UserError(
            f"--extractor: found a feature network of {info.resolution} px in '{extractor}', expected one of"
            f" {pixels.shape[-1]} px, as the images have; leave it out to train one."
        )
    return network, info


def read_images(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
    """uint8 (n, 3, side, side) and labels, from an .npz or .npy, or the image files of a folder or archive.

    Raises:
        UserError: it cannot be read or holds something else.
    """
    images, labels = read_arrays(path) if path.suffix in (".npz", ".npy") else read_files(path)
    if images.ndim == 4 and images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    ArrayImages(images, labels)
    return np.ascontiguousarray(images), labels


def read_arrays(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
    """``images`` and ``labels`` of an .npz, or what an .npy holds."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            return content["images"], content.get("labels")
        return content, None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(
            f"--images: cannot read '{path}' ({error}), expected an .npz with 'images' or an .npy; write it with numpy."
        ) from None


def read_files(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
    """Image files, uint8 (n, side, side, 3), and their folders as labels, where there are several.

    Where there is a folder ``train``, only what is below it.
    """
    try:
        files = {PurePosixPath(name): read() for name, read in image_files(path)}
    except UserError as error:
        raise UserError(str(error).replace("dataset.path", "--images")) from None
    files = {name: content for name, content in files.items() if "train" in name.parts[:-1]} or files
    if not files:
        raise UserError(f"--images: found no images in '{path}', expected files of {', '.join(FORMATS)}.")
    images = []
    for name, content in tqdm(files.items(), desc="images", disable=None):
        try:
            images.append(decode(content))
        except UnreadableImageError as error:
            raise UserError(f"--images: cannot read '{name}' of '{path}' ({error}); leave it out.") from None
    sizes = sorted({image.shape[1::-1] for image in images})
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        found = ", ".join(f"{width}x{height}" for width, height in sizes[:3])
        raise UserError(f"--images: found sizes {found} in '{path}', expected one square size; resize the images.")
    folders = [name.parent.name for name in files]
    classes = sorted(set(folders))
    labels = np.array([classes.index(folder) for folder in folders]) if len(classes) > 1 else None
    return np.stack(images), labels


def train(training: Training, data: Tensor, title: str) -> None:
    """To the run's end, on images drawn at random and mirrored at random; all of it on the device."""
    batch, source = training.run.training.batch, generator(training.run.seed, "batches", device=data.device)
    steps = training.total // batch
    for step in tqdm(range(steps), desc=title, unit="step", disable=None):
        chosen = data[torch.randint(len(data), (batch,), device=data.device, generator=source)]
        mirror = torch.rand(batch, 1, 1, 1, device=data.device, generator=source) < 0.5
        training.step(step, torch.where(mirror, chosen.flip(3), chosen))
        training.ema.update((step + 1) * batch, batch)


def trial(training: Training, data: Tensor) -> float:
    """Seconds an image of training, over the levels; at a learning rate of 0, so that nothing is learned yet."""
    batch = training.run.training.batch
    images = data[torch.arange(batch, device=data.device) % len(data)]
    counts = level_counts(training.process.schedule, "all", 0, 0, batch)
    training.learning_rate = 0.0
    began = 0.0
    for turn in range(2):
        began = clock(data.device)
        for _ in range(TRIAL_STEPS):
            training.update(images, counts)
            training.ema.update((turn + 1) * batch, batch)
    return (clock(data.device) - began) / TRIAL_STEPS / batch


def draw(training: Training, most: int, steps: int, seconds: float, title: str) -> Tensor:
    """Samples, uint8, from the averaged weights: batch after batch until the time or the number is reached."""
    parts: list[Tensor] = []
    began, size = time.perf_counter(), min(most, SAMPLE_BATCH)
    options, model = {**training.run.sampling.options(steps), "batch": size}, training.model
    with tqdm(total=most, desc=f"{title}, samples", unit="image", disable=None) as bar:
        for first in range(0, most, size):
            if parts and time.perf_counter() - began > seconds:
                break
            parts.append(model.draw(min(size, most - first), first, options))
            bar.update(len(parts[-1]))
    return torch.cat(parts)


@torch.inference_mode()
def describe(features: FeatureNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the features of uint8 images, float64, on the CPU."""
    found = torch.cat([features.features(part).double().cpu() for part in images.split(500)])
    return found.mean(0), found.T.cov()


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Frechet distance of two normal distributions, each (mean, covariance), where torch-fidelity is not installed."""
    # The eigenvalues of a product of covariances are real and not negative, but for rounding.
    root = torch.linalg.eigvals(a[1] @ b[1]).real.clamp(min=0).sqrt().sum()
    distance = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * root
    return max(0.0, distance.item())
