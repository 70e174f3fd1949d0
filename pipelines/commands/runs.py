"""``dvdp train``, ``dvdp sample`` and ``dvdp draw``: one step of runs by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from dvdp.config import MOST_PICTURE_PIXELS, Params
from dvdp.errors import UserError
from dvdp.evaluation.figures import grid, save_png
from dvdp.models.export import load_model
from dvdp.training import checkpoints
from dvdp.training.loop import is_finished
from pipelines.jobs.cluster import cluster
from pipelines.jobs.job import Job, jobs
from pipelines.jobs.sample import sample_job
from pipelines.jobs.train import train_job
from pipelines.turning_points import resolve


def chosen(params: Params, setting: str | None, seed: int | None) -> list[Job]:
    """The jobs of one setting, of one seed, or all where None is given."""
    found = [
        job for job in jobs(resolve(params)) if setting in (None, job.run.setting) and seed in (None, job.run.seed)
    ]
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


def sample(params: Params, chosen: list[Job]) -> None:
    """Draw the images of finished runs that scores need."""
    for job in chosen:
        if not is_finished(job.folder):
            raise UserError(
                f"sample: found no weights of {job.name} in '{job.folder}', expected a finished run;"
                " run `dvdp train` with the same params first."
            )
    with cluster(params.cluster) as slots, slots:
        for job in chosen:
            print(f"{job.name}: {sample_job(job, slots)}")


def draw(weights: str, count: int, device: str, out: Path, **options: int | str | None) -> None:
    """One picture of images from a weights file; for ``options`` see :meth:`dvdp.models.export.TrainedModel.sample`."""
    if count < 1:
        raise UserError(f"--count: found {count}, expected at least 1.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found no GPU that torch can use here, expected one; leave out --device.")
    model = load_model(weights, device)
    # As many as a preview may have: small images are enlarged, too.
    most = min(10_000, MOST_PICTURE_PIXELS // model.resolution**2)
    if count > most:
        raise UserError(f"--count: found {count}, expected at most {most:,} at {model.resolution} px, for a picture.")
    print(save_png(grid(model.sample(count, **options)), out))  # type: ignore[arg-type]
