"""Sampling on a fake GPU: every solver, the noise, shards, exported and registered models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import pipelines
from benchmarks.gpu.fake import fake_gpu
from dvdp.diffusion.randomness import ImageNoise
from dvdp.diffusion.solvers import SOLVERS
from dvdp.evaluation.likelihood import variational_bound
from dvdp.evaluation.probability_flow import flow_likelihood
from dvdp.evaluation.samples import write_shard
from dvdp.models.export import load_model
from dvdp.models.given import Given
from dvdp.training.transfer import to_host
from tests.gpu.support import GPU, SMALL, tiny_run, trained


def test_every_solver_waits_for_nothing_but_its_tables(tmp_path: Path) -> None:
    weights = trained(tiny_run(SMALL), tmp_path / "weights.safetensors")
    waits: list[set[str]] = []
    with fake_gpu() as gpu:
        model = load_model(weights, "cuda")
        model.draw(2)  # Tables of the process are copied once.

        def note(_: object) -> None:
            waits.append({f"{wait.what}, {wait.line.function.split()[0]}" for wait in gpu.waits})
            gpu.reset()

        for solver in SOLVERS:
            waits.clear()
            gpu.reset()
            assert (
                model.draw(2, options={**model.run.sampling.options(4), "solver": solver}, callback=note).device == GPU
            )
            # Labels and the tables of a level are copied before its first call; between calls of a level nothing is.
            assert waits[1] == waits[3] == set(), solver
            assert waits[0] | waits[2] <= {"copy from the host, dvdp/diffusion/sampling.py"}, solver


@pytest.mark.parametrize(
    "given",
    [
        None,
        Given(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool), resampling=2),
        Given(torch.zeros(1, 3, 4, 4), upscale=2),
        Given(torch.zeros(1, 3, 8, 8), strength=0.5),
        Given(torch.zeros(1, 3, 8, 8), colourise=True),
    ],
    ids=["guidance alone", "mask", "upscale", "strength", "colourise"],
)
def test_guided_images_of_what_is_given_are_drawn_on_the_gpu(tmp_path: Path, given: Given | None) -> None:
    weights = trained(tiny_run(SMALL, label_dropout=0.1), tmp_path / "weights.safetensors")
    with fake_gpu() as gpu:
        model = load_model(weights, "cuda")
        options = {**model.run.sampling.options(), "guidance_scale": (1.0, 2.0)}
        assert model.draw(2, options=options, given=given).device == GPU
        assert {wait.what for wait in gpu.waits} == {"copy from the host"}, "of tables and of what is given"


def test_likelihoods_are_computed_on_the_gpu(tmp_path: Path) -> None:
    weights = trained(tiny_run(SMALL), tmp_path / "weights.safetensors")
    images, labels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with fake_gpu() as gpu:
        model = load_model(weights, "cuda")
        drawn_with = model.process, model.denoiser, images
        assert len(variational_bound(*drawn_with, timesteps=4, labels=labels, device="cuda").images) == 2
        assert len(flow_likelihood(*drawn_with, steps=4, labels=labels, device="cuda").images) == 2
        convolutions = [launch for launch in gpu.launches if launch.kernel.operator == "convolution"]
        assert {launch.kernel.dtype for launch in convolutions} == {torch.float32}


def test_noise_of_images_is_drawn_on_the_gpu() -> None:
    with fake_gpu() as gpu:
        noise = ImageNoise(0, 0, 3, GPU)
        for shape in ((3, 4, 4), (3, 8, 8)):
            drawn = noise.normal(shape)
            assert (drawn.device, drawn.shape, drawn.dtype) == (GPU, (3, *shape), torch.float32)
        assert not gpu.waits
        gpu.reset()
        noise.normal((3, 8, 8))
        assert [launch.kernel.operator for launch in gpu.launches] == ["dvdp::normal"], "one for all images"


def test_shards_are_written_while_the_next_is_drawn(tmp_path: Path) -> None:
    weights = trained(tiny_run(SMALL), tmp_path / "weights.safetensors")
    with fake_gpu() as gpu:
        model = load_model(weights, "cuda")
        model.draw(2)
        gpu.reset()
        wait_for_it = to_host(model.draw(2, first=2))
        copies = [copy for copy in gpu.copies if copy.to_host]
        assert [(copy.size, copy.pinned) for copy in copies] == [(2 * 3 * 64, True)]
        assert "copy to the host" not in {wait.what for wait in gpu.waits}
        gpu.reset()
        write_shard(tmp_path / "00000002.npy", wait_for_it())
        assert [wait.what for wait in gpu.waits] == ["synchronize"]
    written = np.load(tmp_path / "00000002.npy")
    assert (written.shape, written.dtype) == ((2, 3, 8, 8), np.uint8)


def test_a_model_file_is_read_onto_the_gpu_and_drawn_from_by_class(tmp_path: Path) -> None:
    weights = trained(tiny_run({**SMALL, "networks": "per_level"}), tmp_path / "weights.safetensors")
    with fake_gpu():
        model = load_model(weights, "cuda")
        assert {weight.device for weight in model.denoiser.network.parameters()} == {GPU}
        images = model.sample(3, label="b", solver="ddim", eta=0.5)
    assert (images.device.type, images.shape, images.dtype) == ("cpu", (3, 3, 8, 8), torch.uint8)


def test_the_registered_model_draws_on_a_gpu_where_there_is_one(tmp_path: Path) -> None:
    weights = trained(tiny_run(SMALL), tmp_path / "weights.safetensors")
    code = Path(pipelines.__file__).parent / "tracking/model_code.py"
    spec = importlib.util.spec_from_file_location("model_code", code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with fake_gpu():
        served = module.ImageModel()
        served.load_context(SimpleNamespace(artifacts={"weights": str(weights)}))
        assert served.model.device.type == "cuda"
        found = served.predict(None, pd.DataFrame([{"count": 2, "seed": 5, "format": "numbers"}, {"count": 1}]))
    assert len(found) == 3
    assert found["image"][0].shape == (8, 8, 3)
