"""Steps of the pipeline that need no server and no cluster."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvdp.config import Params, Run, parse_params
from dvdp.data.records import Form, encode
from dvdp.data.writer import StoreWriter
from dvdp.errors import UserError
from dvdp.evaluation.samples import SampleShards, write_shard
from dvdp.models.export import TrainedModel, load_model, save_model
from dvdp.models.unet import build_network
from pipelines.jobs.job import Job, jobs
from pipelines.jobs.sample import missing_shards, sample_shard, seconds_per_sample
from pipelines.jobs.train import LOG
from pipelines.tracking.job_runs import model_file
from pipelines.tracking.runs import SETTING


def params(storage: Path = Path("runs")) -> Params:
    tree = {
        "cluster": {"storage": str(storage), "threads": 1},
        "dataset": {"resolution": 16},
        "settings": {"small": {"process": "dvdp", "turning_points": [500]}},
        "model": {
            "model_channels": 4,
            "channel_mult": [1, 2],
            "attention_factors": [2],
            "num_head_channels": 8,
            "num_classes": 0,
        },
        "sampling": {"count": 8, "steps": 4},
        "evaluation": {"samples": 4, "kid_subset": 2},
        "training": {"preview_steps": 2},
    }
    return parse_params(tree)


def trained(run: Run, weights: Path) -> Path:
    torch.manual_seed(0)
    network = build_network(run.model, 1)
    torch.nn.init.normal_(network.head[-1].weight)  # type: ignore[union-attr]
    # The first as large as moves pixels of 8 bits where the lift has it.
    about = {"run": run.describe(), "band_std": [3.0, 0.9], SETTING: run.setting}
    save_model(weights, network.state_dict(), about)
    return weights


def test_samples_are_drawn_as_the_params_say_now_not_as_they_said_when_the_model_was_trained(tmp_path: Path) -> None:
    (run,) = params().runs()
    weights = trained(run, tmp_path / "weights.safetensors")
    for name, changed in {
        "same": run.sampling,
        "steps": replace(run.sampling, steps=6),
        "solver": replace(run.sampling, solver="ddim"),
        "lift": replace(run.sampling, lift="data"),
        "timestep_spacing": replace(run.sampling, timestep_spacing="quadratic"),
    }.items():
        sample_shard(str(weights), str(tmp_path / name), 2, 3, changed, params().cluster)
        found = np.load(tmp_path / name / "00000002.npy")
        expected = load_model(weights, sampling=changed).sample(3, first=2).numpy()
        np.testing.assert_array_equal(found, expected)
        assert (name == "same") == np.array_equal(found, np.load(tmp_path / "same" / "00000002.npy"))


def test_images_are_the_same_from_any_number_of_tasks_in_any_batch(tmp_path: Path) -> None:
    (run,) = params().runs()
    weights = trained(run, tmp_path / "weights.safetensors")
    expected = load_model(weights, sampling=run.sampling).sample(7).numpy()
    for batch, sizes in ((2, [7]), (64, [3, 4]), (1, [1, 2, 4])):
        folder = tmp_path / f"{batch}-{len(sizes)}"
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        # Workers finish in any order.
        for first, size in reversed(list(zip(starts, sizes, strict=True))):
            changed = replace(run.sampling, batch=batch)
            assert sample_shard(str(weights), str(folder), first, size, changed, params().cluster) == size
        shards = SampleShards(folder)
        found = np.stack([shards[i].numpy() for i in range(len(shards))])
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_task_whose_batch_does_not_fit_goes_on_with_half_of_it_to_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = params(tmp_path).runs()
    job = Job(params(tmp_path), run, "digest")
    weights = str(trained(run, job.weights))
    expected, draw = load_model(weights, sampling=run.sampling).sample(8).numpy(), TrainedModel.draw

    def limited(model: TrainedModel, count: int, *arguments: Any, **options: Any) -> torch.Tensor:
        if count > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(model, count, *arguments, **options)

    monkeypatch.setattr(TrainedModel, "draw", limited)
    assert sample_shard(weights, str(job.samples), 0, 8, run.sampling, job.params.cluster) == 8
    assert [len(np.load(path)) for path in sorted(job.samples.glob("*.npy"))] == [2, 2, 2, 2]
    assert missing_shards(job) == []
    shards = SampleShards(job.samples)
    for found in (np.stack([shards[i].numpy() for i in range(8)]), load_model(weights).sample(8).numpy()):
        assert np.abs(found.astype(int) - expected).max() <= 1
    log = (job.folder / LOG).read_text()
    assert "sampling.batch: memory ran out with 8 images at a time" in log
    assert "it goes on with 2 at a time" in log


def test_a_task_of_several_batches_leaves_a_file_of_each_and_what_it_took(tmp_path: Path) -> None:
    (run,) = params(tmp_path).runs()
    job = Job(params(tmp_path), replace(run, sampling=replace(run.sampling, batch=3)), "digest")
    weights = str(trained(run, job.weights))
    begun = time.perf_counter()
    sample_shard(weights, str(job.samples), 0, 8, job.run.sampling, job.params.cluster)
    elapsed = time.perf_counter() - begun
    found = {path.name: np.load(path) for path in job.samples.glob("*.npy")}
    assert {name: len(images) for name, images in found.items()} == {
        "00000000.npy": 3,
        "00000003.npy": 3,
        "00000006.npy": 2,
    }
    expected = load_model(weights, sampling=job.run.sampling).sample(8).numpy()
    np.testing.assert_array_equal(np.concatenate([images for _, images in sorted(found.items())]), expected)
    assert 0 < 8 * seconds_per_sample(job) < elapsed


def test_a_batch_is_written_while_the_next_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = params().runs()
    weights = trained(run, tmp_path / "weights.safetensors")
    second, draw = threading.Event(), TrainedModel.draw

    def spy(model: TrainedModel, count: int, first: int) -> torch.Tensor:
        if first:
            second.set()
        return draw(model, count, first)

    def write_late(path: Path, images: torch.Tensor) -> None:
        assert second.wait(timeout=20), "nothing was drawn meanwhile"
        write_shard(path, images)

    monkeypatch.setattr(TrainedModel, "draw", spy)
    monkeypatch.setattr("pipelines.jobs.sample.write_shard", write_late)
    changed = replace(run.sampling, batch=4)
    sample_shard(str(weights), str(tmp_path / "samples"), 0, 8, changed, params().cluster)
    assert len(SampleShards(tmp_path / "samples")) == 8


@pytest.mark.parametrize("failing", ["00000000.npy", "00000003.npy", "00000006.npy"])
def test_what_goes_wrong_while_writing_ends_the_task_and_keeps_the_batches_before(tmp_path: Path, failing: str) -> None:
    (run,) = params().runs()
    weights, folder = trained(run, tmp_path / "weights.safetensors"), tmp_path / "samples"
    (folder / failing).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=failing):
        sample_shard(str(weights), str(folder), 0, 8, replace(run.sampling, batch=3), params().cluster)
    left = sorted(path.name for path in folder.glob("*.npy") if path.is_file())
    assert left == [name for name in ("00000000.npy", "00000003.npy") if name < failing]


@pytest.mark.slow
def test_a_killed_task_of_several_batches_keeps_those_it_has_finished(tmp_path: Path) -> None:
    asked = params(tmp_path)
    (run,) = asked.runs()
    asked = replace(asked, cluster=replace(asked.cluster, gpu=True))
    job = Job(asked, replace(run, sampling=replace(run.sampling, count=60, steps=40, batch=4)), "digest")
    weights, count = str(trained(run, job.weights)), job.run.sampling.count
    assert missing_shards(job) == [(0, count)]
    arguments = (weights, str(job.samples), 0, count, job.run.sampling, params().cluster)
    process = multiprocessing.get_context("spawn").Process(target=sample_shard, args=arguments)
    process.start()
    while len(list(job.samples.glob("*.npy"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = {path: path.read_bytes() for path in job.samples.glob("*.npy")}
    assert 3 <= len(kept) < 15
    assert missing_shards(job) == [(4 * len(kept), count - 4 * len(kept))]
    for first, size in missing_shards(job):
        sample_shard(weights, str(job.samples), first, size, job.run.sampling, params().cluster)
    assert all(path.read_bytes() == content for path, content in kept.items())
    shards = SampleShards(job.samples)
    expected = load_model(weights, sampling=job.run.sampling).sample(count)
    assert torch.equal(torch.stack([shards[i] for i in range(len(shards))]), expected)


def test_only_images_that_are_in_no_shard_are_left_to_draw(tmp_path: Path) -> None:
    (run,) = params(tmp_path).runs()
    job = Job(params(tmp_path), replace(run, sampling=replace(run.sampling, count=700, batch=64)), "digest")
    assert missing_shards(job) == [*((first, 64) for first in range(0, 640, 64)), (640, 60)]
    images = torch.zeros((256, 3, 16, 16), dtype=torch.uint8)
    # Drawn by another batch, or when fewer were asked for.
    for first, size in ((100, 256), (512, 100)):
        write_shard(job.samples / f"{first:08d}.npy", images[:size])
    # What a killed worker leaves of a shard is none.
    (job.samples / ".00000000.npy.17.part").write_bytes(b"half")
    left = missing_shards(job)
    assert left == [(0, 64), (64, 36), (356, 64), (420, 64), (484, 28), (612, 64), (676, 24)]
    for first, size in left:
        write_shard(job.samples / f"{first:08d}.npy", images[:size])
    assert missing_shards(job) == []
    assert len(SampleShards(job.samples)) == 700


def test_a_task_that_is_a_process_draws_more_images(tmp_path: Path) -> None:
    asked = params(tmp_path)
    (run,) = asked.runs()
    asked = replace(asked, cluster=replace(asked.cluster, gpu=True))
    job = Job(asked, replace(run, sampling=replace(run.sampling, count=700, batch=64)), "digest")
    assert missing_shards(job) == [(0, 256), (256, 256), (512, 188)]


def test_a_registered_model_samples_by_default_as_its_own_setting_does(tmp_path: Path) -> None:
    """Two settings may share a training and differ in how they sample; each registers a model of its own."""
    (run,) = params(tmp_path).runs()
    one = Job(params(tmp_path), run, "digest")
    other = Job(one.params, replace(run, setting="otherwise", sampling=replace(run.sampling, steps=6)), "digest")
    assert one.weights == other.weights
    trained(run, one.weights)
    assert model_file(one) == one.weights
    model = load_model(model_file(other))
    assert model.run.sampling.steps == 6
    assert model.description[SETTING] == "otherwise"
    assert not any(model.process.band_std)
    np.testing.assert_array_equal(model.sample(2), load_model(one.weights).sample(2, steps=6))


@pytest.mark.parametrize(
    ("names", "classes", "sentence"),
    [
        (["a", "b"], 3, "found 3 for small, expected 0, or 2 as in data/twos/store; change it."),
        ([], 3, "found 3 for small, expected 0, as there are no labels in data/twos/store; change it."),
        (["a", "b"], 2, None),
        (["a", "b"], 0, None),
    ],
)
def test_a_network_is_conditional_on_all_classes_of_the_data_or_unconditional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], classes: int, sentence: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    form, count = Form(16), 4
    pixels = np.zeros((count, 3, 16, 16), np.uint8)
    with StoreWriter(Path("data/twos/store"), name="twos", source="image_folder", form=form, labels=names) as writer:
        writer.add(encode(list(pixels), [i % 2 if names else -1 for i in range(count)], form))
        writer.finish()
    asked = params()
    asked = replace(asked, dataset=replace(asked.dataset, name="twos"), model=replace(asked.model, num_classes=classes))
    if sentence is None:
        assert [job.run.model.num_classes for job in jobs(asked)] == [classes]
        return
    with pytest.raises(UserError, match=re.escape(sentence)):
        jobs(asked)
