"""Several ranks train one run, go on to the bit, and on another number of ranks as if nothing had changed."""

import contextlib
import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from dvdp import UserError
from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.models.unet import build_network
from dvdp.training import ledger, ranks
from dvdp.training.loop import Training, train
from dvdp.training.optimizer import Muon, matrices
from dvdp.training.ranks import gather, shard, share_like


def small_run(**training: object) -> Run:
    tree = {
        "dataset": {"resolution": 16},
        "settings": {"small": {"process": "dvdp", "turning_points": [400]}},
        "model": {
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_res_blocks": 2,
            "attention_factors": [2],
            "num_head_channels": 8,
            "num_classes": 0,
        },
        "training": {
            "images": 360,
            "groups": 12,
            "budget": "images",
            "batch": 12,
            "accumulation": 6,
            "warmup_images": 0,
        },
    }
    tree["training"] |= {"checkpoint_images": 120, "keep_checkpoints": 9, "log_images": 84, "preview_images": 0}
    tree["training"] |= {"optimizer": "adamw", "learning_rate": 0.001, "cooldown": 0.0, "precision": "fp32"}
    tree["training"] |= training
    return parse_params(tree).runs()[0]


def rank(number: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=number, world_size=world_size)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), dtype=np.uint8)
    train(small_run(), ArrayImages(pixels), folder, "abc")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_run_of_several_ranks_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path, world_size: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    mp.spawn(rank, (world_size, whole), nprocs=world_size)
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / f"{120:012d}.safetensors", resumed / "checkpoints")
    shutil.copy(whole / "metrics.jsonl", resumed)
    mp.spawn(rank, (world_size, resumed), nprocs=world_size)

    one, two = (load_file(folder / "weights.safetensors") for folder in (whole, resumed))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    losses = [[(e.images, e.metrics["loss"]) for e in ledger.read(f / "metrics.jsonl")] for f in (whole, resumed)]
    assert losses[0] == losses[1]
    assert [images for images, _ in losses[0]] == [84, 168, 252, 336, 360]


def changing_ranks(number: int, folder: Path, sharded: bool, training: dict[str, Any], model: dict[str, Any]) -> None:
    """A run that four ranks begin, two go on with and one ends, and one that is alone from the start."""
    torch.set_num_threads(1)
    pixels = ArrayImages(np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), dtype=np.uint8))
    held = {}
    for world_size, images in ((4, 120), (2, 240), (1, 360)):
        if number >= world_size:
            return
        run = small_run(images=images, log_images=60, preview_images=180, preview_count=2, preview_steps=2, **training)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model))
        if world_size > 1:
            meet = f"file://{folder}.{world_size}"
            dist.init_process_group("gloo", init_method=meet, rank=number, world_size=world_size)
        with gradients_kept() as kept, compiled_fast():
            train(run, pixels, folder, "abc", sharded=sharded, preview=lambda *_: None)
        held[world_size] = kept
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
            if number == 0:
                (folder / "weights.safetensors").unlink()
    with compiled_fast():
        train(run, pixels, folder.with_name("alone"), "abc")
    folder.with_name("held.json").write_text(json.dumps(held))


def compiled_fast() -> contextlib.AbstractContextManager[object]:
    """Within it, graphs are cut and differentiated as for g++, which would take minutes, and then run as they are."""
    compiling = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    return mock.patch.object(torch.nn.Module, "compile", compiling)


@contextlib.contextmanager
def gradients_kept() -> Iterator[dict[str, int]]:
    """Bytes that this rank holds after a step of what it may share with others."""
    found: dict[str, int] = {}
    update = Training.update

    def look(self: Training, *arguments: Any) -> None:
        update(self, *arguments)
        weights = list(self.network.parameters())
        states = [
            value for optimizer in self.optimizers for state in optimizer.state.values() for value in state.values()
        ]
        kinds = {
            "weights": weights,
            "gradients": [weight.grad for weight in weights if weight.grad is not None],
            "average": list(self.ema.network.parameters()),
            "optimiser": [state for state in states if state.ndim],
        }
        for kind, tensors in kinds.items():
            storages = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
            # Shares of a stage's gradients lie in one.
            found[kind] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    with mock.patch.object(Training, "update", look):
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "training", "model"),
    [
        (False, {}, {}),
        (True, {"optimizer": "muon"}, {}),
        (True, {"precision": "bf16"}, {}),
        (True, {"activation_checkpointing": True, "levels": "one", "compile": True}, {"networks": "per_level"}),
    ],
)
def test_a_run_goes_on_with_fewer_ranks_as_one_rank_would_have(
    tmp_path: Path, sharded: bool, training: dict[str, Any], model: dict[str, Any]
) -> None:
    changing, alone = tmp_path / "changing", tmp_path / "alone"
    mp.spawn(changing_ranks, (changing, sharded, training, model), nprocs=4)
    losses = [[e.metrics["loss"] for e in ledger.read(f / "metrics.jsonl")] for f in (changing, alone)]
    assert len(losses[0]) == 6
    # In bf16, a norm's weights too are rounded where they are shared.
    rounded = training.get("precision") == "bf16"
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if rounded else 1e-4)
    one, two = (load_file(folder / "weights.safetensors") for folder in (changing, alone))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        # Muon brings gradients that are hardly more than rounding, as before a layer of zeros, to the size of others.
        assert (weight - two[name]).norm() <= (0.3 if rounded else 0.1) * weight.norm() + 1e-3, name
    held = json.loads((tmp_path / "held.json").read_text())
    for kind, whole in held["1"].items():
        for world_size in (2, 4):
            share = held[str(world_size)][kind] / whole
            assert share == pytest.approx(1 / world_size if sharded else 1, rel=0.1)


def muon_on_shares(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=3)
    run = small_run()
    torch.manual_seed(0)
    network = build_network(run.model, 1)
    spread = copy.deepcopy(network)
    shard(spread, torch.device("cpu"), "fp32")
    optimizers = [Muon(matrices(each), lr=0.1, weight_decay=0.1) for each in (network, spread)]
    for _ in range(2):
        for weight, share in zip(matrices(network), matrices(spread), strict=True):
            weight.grad = torch.randn_like(weight)
            share.grad = share_like(weight.grad, share)
        for optimizer in optimizers:
            optimizer.step()
    wholes = gather(spread.state_dict())
    if number == 0:
        assert all(torch.equal(tensor, wholes[name]) for name, tensor in network.state_dict().items())
    else:
        assert not wholes
    dist.destroy_process_group()


@pytest.mark.slow
def test_muon_steps_on_shares_of_matrices_as_on_whole_ones(tmp_path: Path) -> None:
    mp.spawn(muon_on_shares, (tmp_path,), nprocs=3)


def order_of_gradients(number: int, folder: Path, compiled: bool) -> None:
    """Notes when a bucket of gradients is sent to the other rank, and when those of the first layer are ready."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    # Of several buckets of 1 MiB.
    run = small_run(compile=compiled, activation_checkpointing=True)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, model_channels=64, num_res_blocks=1))
    pixels = ArrayImages(np.zeros((12, 3, 16, 16), np.uint8))
    smaller = mock.patch.object(ranks, "DistributedDataParallel", partial(DistributedDataParallel, bucket_cap_mb=1))
    with smaller, compiled_fast():
        training = Training(run, pixels, folder, "abc", False, torch.device("cpu"), None)
    events: list[str] = []

    def send(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        events.append("bucket")
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    assert isinstance(training.live, DistributedDataParallel)
    training.live.register_comm_hook(None, send)
    training.network.stem.weight.register_hook(lambda _: events.append("stem"))  # type: ignore[union-attr, operator]
    for step in range(2):
        events.clear()
        training.step(step, torch.zeros((6, 3, 16, 16), dtype=torch.uint8))
    if number == 0:
        (folder / "events.json").write_text(json.dumps(events))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_ranks_exchange_gradients_while_the_backward_pass_goes_on(tmp_path: Path, compiled: bool) -> None:
    mp.spawn(order_of_gradients, (tmp_path, compiled), nprocs=2)
    events = json.loads((tmp_path / "events.json").read_text())
    *_, last = (place for place, event in enumerate(events) if event == "stem")
    # Parts before the last exchange nothing.
    assert "bucket" not in events[: events.index("stem")]
    assert events[:last].count("bucket") > events[last:].count("bucket") > 0, events


def test_parts_that_are_found_by_trying_and_shares_exclude_each_other(tmp_path: Path) -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        run, pixels = small_run(batch_fit=True), ArrayImages(np.zeros((12, 3, 16, 16), np.uint8))
        with pytest.raises(UserError, match=r"^training\.batch_fit: found true beside cluster\.shard, expected false"):
            Training(run, pixels, tmp_path, "abc", False, torch.device("cpu"), None, sharded=True)
    finally:
        dist.destroy_process_group()
