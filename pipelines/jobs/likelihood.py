"""The bound on the likelihood of real images under a job's model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from dvdp.config import Params, SamplingParams
from dvdp.data.store import ImageStore
from dvdp.diffusion.randomness import generator
from dvdp.errors import UserError
from dvdp.evaluation.likelihood import variational_bound
from dvdp.files import write_atomically
from dvdp.identity import likelihood_hash
from dvdp.models.export import load_model
from pipelines.jobs.cluster import Held, on_worker
from pipelines.jobs.device import worker_device
from pipelines.jobs.job import Sampled
from pipelines.jobs.paths import DataPaths


def check_likelihood(params: Params) -> None:
    """Raise UserError unless the data set has as many images as are asked for."""
    count = len(ImageStore(DataPaths.of(params).store))
    if params.evaluation.likelihood > count:
        raise UserError(
            f"evaluation.likelihood: found {params.evaluation.likelihood}, expected at most the {count} images of the"
            " data set; take fewer."
        )


def likelihood_job(job: Sampled, held: Held | None = None) -> dict[str, float]:
    """:attr:`dvdp.evaluation.likelihood.Bound.metrics` of ``evaluation.likelihood`` images, unless that is done.

    Args:
        held: a slot of the cluster: a worker computes it. None to do so in this process, on its CPU.
    """
    if not job.params.evaluation.likelihood:
        return {}
    path, params = _path(job), job.params.cluster
    if not path.exists():
        check_likelihood(job.params)
        places = job.weights.resolve(), DataPaths.of(job.params).store.resolve()
        work = partial(bound_likelihood, *places, job.params.evaluation.likelihood, job.run.sampling)
        found = on_worker(params, likelihood_on_worker, work, params.threads, worker_device(params)) if held else work()
        write_atomically(path, json.dumps(found, indent=2) + "\n")
    return known_likelihood(job)


def known_likelihood(job: Sampled) -> dict[str, float]:
    """What :func:`likelihood_job` found; nothing where none is asked for, or it is still to be done."""
    there = job.params.evaluation.likelihood and _path(job).exists()
    return json.loads(_path(job).read_text()) if there else {}


def has_likelihood(job: Sampled) -> bool:
    """Whether :func:`likelihood_job` has nothing to do."""
    return not job.params.evaluation.likelihood or _path(job).exists()


def likelihood_on_worker(work: partial[dict[str, float]], threads: int, device: str) -> dict[str, float]:
    """The work of :func:`likelihood_job`."""
    torch.set_num_threads(threads)
    return work(device=device)


def bound_likelihood(
    weights: Path, store: Path, count: int, sampling: SamplingParams, device: str = "cpu"
) -> dict[str, float]:
    """Of images drawn without replacement: for a data set always the same, and in the same order."""
    images, model = ImageStore(store), load_model(weights, device, sampling)
    chosen = torch.randperm(len(images), generator=generator("likelihood images"))[:count].tolist()
    labels = None if model.classes is None else torch.tensor([images[index][1] for index in chosen])
    bound = variational_bound(
        model.process,
        model.denoiser,
        torch.from_numpy(images.images(chosen)),
        sampling.variance,
        sampling.clip,
        labels=labels,
        batch=sampling.batch,
        device=model.device,
    )
    return bound.metrics


def _path(job: Sampled) -> Path:
    digest = ImageStore(DataPaths.of(job.params).store).metadata.digest
    name = likelihood_hash(job.run, job.trained, job.params.evaluation.likelihood, digest)
    return job.folder / "likelihoods" / f"{name}.json"
