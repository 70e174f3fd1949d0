"""Steps of the pipeline that need no server and no cluster."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from dvdp.config import Params, Run, SamplingParams, parse_params
from dvdp.data.records import Form, encode
from dvdp.data.writer import StoreWriter
from dvdp.errors import UserError
from dvdp.evaluation.samples import SampleShards, write_shard
from dvdp.models.export import TrainedModel, load_model, save_model
from dvdp.models.unet import build_network
from pipelines.jobs.cluster import cluster
from pipelines.jobs.job import Job, jobs
from pipelines.jobs.sample import Sampler, missing_shards, sample_job, seconds_per_sample, warm_up
from pipelines.jobs.train import LOG
from pipelines.tracking.job_runs import model_file
from pipelines.tracking.runs import SETTING

#: Of a process that draws.
NAME = "ray::Sampler"


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


def sampler(weights: Path, folder: Path, sampling: SamplingParams) -> Sampler:
    return Sampler(str(weights), str(folder), sampling, 1, "cpu")


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
        sampler(weights, tmp_path / name, changed)(2, 3)()
        found = np.load(tmp_path / name / "00000002.npy")
        expected = load_model(weights, sampling=changed).sample(3, first=2).numpy()
        np.testing.assert_array_equal(found, expected)
        assert (name == "same") == np.array_equal(found, np.load(tmp_path / "same" / "00000002.npy"))


def test_what_a_worker_wrote_before_it_died_is_not_drawn_again(tmp_path: Path) -> None:
    (run,) = params().runs()
    weights, drawn = trained(run, tmp_path / "weights.safetensors"), tmp_path / "drawn"
    again = sampler(weights, drawn, run.sampling)
    assert again(4, 2)() == 2
    there = drawn / "00000004.npy"
    written = there.stat().st_mtime_ns
    assert again(4, 2)() == 2, "all of it"
    assert again(4, 5)() == 5, "the first part of it, of two into which it was cut for want of memory"
    assert there.stat().st_mtime_ns == written
    assert sorted(path.name for path in drawn.glob("*.npy")) == ["00000004.npy", "00000006.npy"]
    assert float((drawn / "00000006.seconds").read_text()) > 0
    expected = load_model(weights, sampling=run.sampling).sample(5, first=4).numpy()
    np.testing.assert_array_equal(np.concatenate([np.load(path) for path in sorted(drawn.glob("*.npy"))]), expected)


def test_images_are_the_same_in_shards_of_any_size(tmp_path: Path) -> None:
    (run,) = params().runs()
    weights = trained(run, tmp_path / "weights.safetensors")
    expected = load_model(weights, sampling=run.sampling).sample(7).numpy()
    for sizes in ([7], [3, 4], [1, 2, 4]):
        folder = tmp_path / str(len(sizes))
        draw, starts = sampler(weights, folder, run.sampling), [sum(sizes[:i]) for i in range(len(sizes))]
        # Workers finish in any order.
        for first, size in reversed(list(zip(starts, sizes, strict=True))):
            assert draw(first, size)() == size
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
    assert sampler(Path(weights), job.samples, run.sampling)(0, 8)() == 8
    assert [len(np.load(path)) for path in sorted(job.samples.glob("*.npy"))] == [2, 2, 2, 2]
    assert missing_shards(job) == []
    shards = SampleShards(job.samples)
    for found in (np.stack([shards[i].numpy() for i in range(8)]), load_model(weights).sample(8).numpy()):
        assert np.abs(found.astype(int) - expected).max() <= 1
    log = (job.folder / LOG).read_text()
    assert "sampling.batch: memory ran out with 8 images at a time" in log
    assert "it goes on with 2 at a time" in log


def test_a_worker_leaves_a_file_of_each_batch_and_what_it_took_without_loading_and_warming_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(model: TrainedModel) -> None:
        warm_up(model)
        time.sleep(2)

    (run,) = params(tmp_path).runs()
    job = Job(params(tmp_path), replace(run, sampling=replace(run.sampling, batch=3)), "digest")
    trained(run, job.weights)
    monkeypatch.setattr("pipelines.jobs.sample.warm_up", slow)
    begun = time.perf_counter()
    draw = sampler(job.weights, job.samples, job.run.sampling)
    for shard in missing_shards(job):
        draw(*shard)()
    elapsed = time.perf_counter() - begun
    found = {path.name: np.load(path) for path in job.samples.glob("*.npy")}
    assert {name: len(images) for name, images in found.items()} == {
        "00000000.npy": 3,
        "00000003.npy": 3,
        "00000006.npy": 2,
    }
    expected = load_model(job.weights, sampling=job.run.sampling).sample(8).numpy()
    np.testing.assert_array_equal(np.concatenate([images for _, images in sorted(found.items())]), expected)
    assert 0 < 8 * seconds_per_sample(job) < elapsed - 2


def test_a_batch_is_timed_from_the_one_before_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is told to draw a batch long before it begins with it."""
    now = iter([0.0, 1.0, 7.0, 12.0, 20.0, 21.0])  # Two are begun, one and the other are there; a third after a pause.
    (run,) = params().runs()
    draw = sampler(trained(run, tmp_path / "weights.safetensors"), tmp_path / "samples", run.sampling)
    monkeypatch.setattr("pipelines.jobs.sample.time.perf_counter", lambda: next(now))
    first, second = draw(0, 1), draw(1, 1)
    first()
    second()
    draw(2, 1)()
    found = [float(path.read_text()) for path in sorted((tmp_path / "samples").glob("*.seconds"))]
    assert found == [7, 5, 1]


def test_warming_up_takes_a_step_at_each_level(tmp_path: Path) -> None:
    (run,) = params().runs()
    model = load_model(trained(run, tmp_path / "weights.safetensors"), sampling=replace(run.sampling, steps=999))
    shapes = []
    model.denoiser.network.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    warm_up(model)
    assert shapes == [(1, 3, 8, 8), (1, 3, 16, 16)]


@pytest.mark.parametrize("failing", ["00000000.npy", "00000003.npy", "00000006.npy"])
def test_a_shard_that_cannot_be_written_is_an_error_and_those_before_are_kept(tmp_path: Path, failing: str) -> None:
    (run,) = params().runs()
    weights, folder = trained(run, tmp_path / "weights.safetensors"), tmp_path / "samples"
    (folder / failing).mkdir(parents=True)
    draw, shards = sampler(weights, folder, run.sampling), [(0, 3), (3, 3), (6, 2)]
    with pytest.raises(IsADirectoryError, match=failing):
        [draw(*shard)() for shard in shards]
    left = sorted(path.name for path in folder.glob("*.npy") if path.is_file())
    assert left == [name for name in ("00000000.npy", "00000003.npy") if name < failing]


@pytest.mark.slow
def test_a_worker_killed_while_it_draws_is_started_again_and_draws_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked = params(tmp_path)
    asked = replace(asked, cluster=replace(asked.cluster, busy="share"))
    (run,) = asked.runs()
    job = Job(asked, replace(run, sampling=replace(run.sampling, count=60, steps=40, batch=4)), "digest")
    trained(run, job.weights)
    kept: dict[Path, int] = {}

    def kill() -> None:
        while not kept:
            time.sleep(0.01)
            if len(list(job.samples.glob("*.npy"))) >= 3:
                children = psutil.Process().children(recursive=True)
                worker = next(each for each in children if NAME in each.cmdline()[0])
                worker.kill()
                worker.wait()
                kept.update({path: path.stat().st_mtime_ns for path in job.samples.glob("*.npy")})

    with cluster(asked.cluster) as slots, slots.hold(1) as held:
        killer = threading.Thread(target=kill)
        killer.start()
        sample_job(job, held)
        killer.join()
    assert 3 <= len(kept) < 15
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a shard was drawn again"
    shards = SampleShards(job.samples)
    expected = load_model(job.weights, sampling=job.run.sampling).sample(job.run.sampling.count)
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


def test_a_shard_is_a_batch_of_any_size_and_on_a_cpu_no_more_than_leaves_some_for_each_core(tmp_path: Path) -> None:
    asked = params(tmp_path)
    (run,) = asked.runs()
    job = Job(asked, replace(run, sampling=replace(run.sampling, count=1200, batch=1024)), "digest")
    assert missing_shards(job) == [(0, 256), (256, 256), (512, 256), (768, 256), (1024, 176)]
    on_gpu = replace(job, params=replace(asked, cluster=replace(asked.cluster, gpu=True)))
    assert missing_shards(on_gpu) == [(0, 1200)], (
        "of which the level of half the resolution has four times as many at once"
    )


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
