"""The likelihood of a job's model: of the data set's images, computed once, and kept beside the scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdp.config import parse_params
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.diffusion.randomness import generator
from dvdp.errors import UserError
from dvdp.evaluation.likelihood import variational_bound
from dvdp.identity import evaluation_hash
from dvdp.models.export import load_model, save_model
from dvdp.models.unet import build_network
from pipelines.jobs.job import Job
from pipelines.jobs.likelihood import has_likelihood, known_likelihood, likelihood_job
from pipelines.jobs.paths import DataPaths

TREE: dict[str, Any] = {
    "settings": {"dvdp": {"process": "dvdp", "turning_points": [300]}},
    "dataset": {"resolution": 16},
    "model": {"model_channels": 4, "channel_mult": [1, 2], "attention_factors": [2], "num_head_channels": 8},
    "evaluation": {"likelihood": 6},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits in a store."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = parse_params(TREE)
        prepare(params.dataset, DataPaths.of(params).store)
    return folder


@pytest.fixture
def job(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Untrained, class-conditional."""
    monkeypatch.chdir(data)
    params = parse_params({**TREE, "cluster": {"storage": str(tmp_path)}})
    metadata = ImageStore(DataPaths.of(params).store).metadata
    job = Job(params, params.runs()[0], metadata.digest)
    torch.manual_seed(0)
    network = build_network(job.run.model, 1)
    torch.nn.init.normal_(network.head[-1].weight, std=0.1)  # type: ignore[union-attr]
    save_model(job.weights, network.state_dict(), {"run": job.run.describe(), **metadata.model_metadata(1)})
    return job


def test_it_is_the_bound_of_images_of_the_data_set_with_their_classes(job: Job) -> None:
    found = likelihood_job(job)
    store, model = ImageStore(DataPaths.of(job.params).store), load_model(job.weights)
    assert found["bits_per_dim_images"] == 6
    parts = ("prior", "level_1", "lift_1", "level_0", "decoder")
    assert sum(found[f"bits_per_dim_{part}"] for part in parts) == pytest.approx(found["bits_per_dim"])
    chosen = torch.randperm(len(store), generator=generator("likelihood images"))[:6].tolist()
    pixels, labels = torch.from_numpy(store.images(chosen)), torch.tensor([store[i][1] for i in chosen])
    expected = variational_bound(model.process, model.denoiser, pixels, labels=labels)
    assert found == pytest.approx(expected.metrics, rel=1e-5)


def test_it_is_computed_once_for_what_it_depends_on(job: Job) -> None:
    assert not has_likelihood(job)
    assert known_likelihood(job) == {}
    found = likelihood_job(job)
    assert has_likelihood(job)
    job.weights.unlink()  # It is not needed again.

    def sampled(**changes: Any) -> Job:
        return replace(job, run=replace(job.run, sampling=replace(job.run.sampling, **changes)))

    for name, value in {"steps": 7, "solver": "ddim", "seed": 5, "count": 300, "batch": 3}.items():
        assert likelihood_job(sampled(**{name: value})) == found
    for name, value in {"variance": "fixed_large", "clip": False, "lift": "data"}.items():
        assert not has_likelihood(sampled(**{name: value}))


def test_it_names_nothing_else(job: Job) -> None:
    """Turned on for a finished run, it computes nothing but itself."""
    without = replace(job, params=parse_params({**TREE, "evaluation": {"likelihood": 0}}))
    assert has_likelihood(without)
    assert likelihood_job(without) == {}
    assert without.training_hash == job.training_hash
    assert without.sampling_hash == job.sampling_hash
    assert evaluation_hash(without.params.evaluation, "s", "r") == evaluation_hash(job.params.evaluation, "s", "r")


def test_more_images_than_there_are_is_one_sentence(job: Job) -> None:
    greedy = replace(job, params=parse_params({**TREE, "evaluation": {"likelihood": 1798}}))
    with pytest.raises(UserError, match=r"evaluation.likelihood: found 1798, expected at most the 1797 images"):
        likelihood_job(greedy)
