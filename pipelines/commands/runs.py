"""``dvdp train``, ``dvdp sample`` and ``dvdp draw``: one step of runs by itself."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dvdp.config import MOST_PICTURE_PIXELS, Params
from dvdp.errors import UserError
from dvdp.evaluation.figures import grid, save_png
from dvdp.evaluation.samples import SampleShards
from dvdp.files import write_atomically
from dvdp.models.export import load_model
from dvdp.models.given import given
from dvdp.training import checkpoints
from dvdp.training.loop import is_finished
from pipelines.jobs.cluster import cluster
from pipelines.jobs.job import Job, Sampled, jobs
from pipelines.jobs.sample import sample_job
from pipelines.jobs.train import train_job
from pipelines.starts import fetch_starts
from pipelines.turning_points import resolve


def chosen(params: Params, setting: str | None, seed: int | None) -> list[Job]:
    """The jobs of one setting, of one seed, or all where None is given."""
    listed = jobs(resolve(fetch_starts(params)))
    found = [job for job in listed if setting in (None, job.run.setting) and seed in (None, job.run.seed)]
    if not found:
        raise UserError(
            f"--setting, --seed: found no such run, expected a setting of {', '.join(params.settings)}"
            f" and a seed of {list(params.seeds)}."
        )
    return found


def train(params: Params, chosen: list[Job], resume: bool) -> None:
    """Train, going on from checkpoints; with ``resume`` there must be one of every run that is not finished."""
    for job in chosen:
        if not is_finished(job.folder):
            found = checkpoints.find(job.folder / "checkpoints")
            if found:
                checkpoints.read(found[-1], job.training_hash)
            elif resume:
                raise UserError(
                    f"--resume: found no checkpoint of {job.name} in '{job.folder}', expected one;"
                    " leave out --resume to start, or give the params that the run was started with."
                )
    with cluster(params.cluster):
        for job in chosen:
            print(f"{job.name}: {train_job(job, {'dataset': params.dataset.name})}")


def sample(params: Params, chosen: Sequence[Sampled], out: Path | None) -> list[Path]:
    """Draw ``sampling.count`` images each, on the cluster; what is there already is kept.

    Args:
        chosen: finished runs, or registered models.
        out: folder of PNG files, one an image, in a folder for each of several that are chosen.

    Returns:
        The folder of each.
    """
    for subject in chosen:
        if isinstance(subject, Job) and not is_finished(subject.folder):
            raise UserError(
                f"sample: found no weights of {subject.name} in '{subject.folder}', expected a finished run;"
                " run `dvdp train` with the same params first."
            )
    folders = [out / subject.name.replace(" ", "-") if out and len(chosen) > 1 else out for subject in chosen]
    for subject, folder in zip(chosen, folders, strict=True):
        if folder:
            check_same(folder, subject)
    found = []
    with cluster(params.cluster) as slots, slots.hold(params.cluster.num_workers) as held:
        for subject, folder in zip(chosen, folders, strict=True):
            samples = sample_job(subject, held)
            if folder:
                write_images(samples, folder, subject)
            found.append(folder or samples)
    return found


#: In a folder of images: which ones.
ABOUT = "images.json"


def _about(subject: Sampled) -> str:
    about = {"model": subject.name, "weights": subject.trained, "sampling": subject.run.sampling.options()}
    return json.dumps(about, indent=2) + "\n"


def check_same(folder: Path, subject: Sampled) -> None:
    """Raise UserError if a folder holds anything else than images of this model, drawn alike."""
    if folder.is_dir() and any(folder.iterdir()):
        known = folder / ABOUT
        if not known.is_file() or known.read_text() != _about(subject):
            raise UserError(
                f"--out: found other files in '{folder}', expected an empty folder, or one of images of {subject.name}"
                " drawn as the params say; name another."
            )


def write_images(samples: Path, folder: Path, subject: Sampled) -> None:
    """Write each sample as ``<number, 8 digits>.png``, unless it is there, and which they are (:data:`ABOUT`)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ABOUT, _about(subject))
    drawn = SampleShards(samples)
    for i in tqdm(range(subject.run.sampling.count), desc=str(folder), unit="image", mininterval=1):
        path = folder / f"{i:08d}.png"
        if not path.exists():
            file = io.BytesIO()
            Image.fromarray(drawn[i].permute(1, 2, 0).numpy()).save(file, "PNG")
            write_atomically(path, file.getvalue())


def draw(
    weights: str, count: int, device: str, out: Path, request: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """One picture of images from a weights file.

    Args:
        request: what is given of the images, for :func:`dvdp.models.given.given`.
        options: of :meth:`dvdp.models.export.TrainedModel.sample`.
    """
    if count < 1:
        raise UserError(f"--count: found {count}, expected at least 1.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found no GPU that torch can use here, expected one; leave out --device.")
    model = load_model(weights, device)
    # As many as a preview may have: small images are enlarged, too.
    most = min(10_000, MOST_PICTURE_PIXELS // model.resolution**2)
    if count > most:
        raise UserError(f"--count: found {count}, expected at most {most:,} at {model.resolution} px, for a picture.")
    known = given(model.resolution, **(request or {}))
    print(save_png(grid(model.sample(count, given=known, **options)), out))
