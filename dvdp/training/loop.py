"""The training loop: progress counted in images, resumed to the bit.

Runs in any process, alone or as one rank of an initialised ``torch.distributed`` group. Everything random in a step
is a function of (run seed, step) and an image's place in it, dropout of (run seed, step, rank), so an interrupted run
goes on as if nothing had happened, and without dropout so does one on another number of ranks, up to rounding.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dvdp.config import Run
from dvdp.data.loading import Batch, Images, training_batches
from dvdp.diffusion.randomness import derive_seed
from dvdp.errors import UserError
from dvdp.files import locked, write_atomically
from dvdp.models.compilation import compile_network, explained
from dvdp.models.compute import Computing, arrange
from dvdp.models.denoiser import example
from dvdp.models.export import TrainedModel, load_model, save_model
from dvdp.models.flops import mean_flops, training_flops, training_images
from dvdp.models.pixels import to_float
from dvdp.models.unet import build_network
from dvdp.out_of_memory import in_batches, release
from dvdp.training import checkpoints, ledger, ranks
from dvdp.training.ema import EMA
from dvdp.training.estimate import Estimate, median_seconds, peak_memory
from dvdp.training.fit import PartSize, average_gradients
from dvdp.training.graphs import PartGraphs
from dvdp.training.levels import draw, drop_labels, level_counts, parts, training_spans
from dvdp.training.memory import activation_bytes, run_bytes, worker_memory
from dvdp.training.optimizer import build_optimizers, pack_optimizers, unpack_optimizers
from dvdp.training.shortage import cut_to, part_of
from dvdp.training.shortage import explained as explained_shortage
from dvdp.training.start import starting_weights
from dvdp.training.transfer import to_device

logger = logging.getLogger("dvdp.training")
#: Shows previews: (images seen, samples as uint8 (n, 3, H, W), file to write).
Preview = Callable[[int, Tensor, Path], None]
#: Seconds to wait for another process that trains the same run: one whose driver was killed is about to end.
PATIENCE = 60.0
#: In place of a number of images seen.
FINISHED, BUSY = -1, -2


def is_finished(folder: Path) -> bool:
    """Whether the run of this folder has its final weights."""
    return (folder / "weights.safetensors").is_file()


def train(
    run: Run,
    images: Images,
    folder: Path,
    training_hash: str,
    *,
    flip: bool = False,
    device: torch.device | str = "cpu",
    description: Mapping[str, Any] | None = None,
    preview: Preview | None = None,
    sharded: bool = False,
    start: Path | None = None,
) -> None:
    """Train a run to its end, going on from its newest checkpoint, or from the weights of ``training.start``.

    Leaves in ``folder``: ``checkpoints/``, ``metrics.jsonl``, ``previews/``, ``estimate.json``, with
    ``training.batch_fit`` ``parts.json`` once memory ran out, and, last,
    ``weights.safetensors`` (:func:`dvdp.models.export.load_model`). A finished run returns at once. Whoever comes
    second waits for the first, for :data:`PATIENCE` seconds.

    Args:
        training_hash: of :func:`dvdp.identity.training_hash`; a checkpoint of another is refused.
        flip: mirror images at random.
        description: goes into the header of the weights, beside the run; see :meth:`TrainedModel.of
            <dvdp.models.export.TrainedModel.of>` for what of the data it has to tell.
        preview: turns samples from the EMA weights into a picture.
        sharded: spread weights, gradients, optimiser and average over the ranks, if there are several.
        start: where the weights of ``training.start`` lie, if not there.

    Raises:
        UserError: a checkpoint is damaged or of another configuration, the weights to start from are gone or others
            than those that named the run, the batch does not divide over ranks, the
            loss is no longer finite, ``training.compile`` finds no compiler, or another process goes on training this
            run, or with ``training.batch_fit`` not even one image fits into memory. All ranks raise it alike.
        OutOfMemory: memory ran out; a rank raises it alone.
    """
    device, folder = torch.device(device), Path(folder)
    with _alone(folder) as free:
        # Rank 0 looks and tells the others: on a shared file system they may not see the same yet.
        seen = _agree(_finished_or_seen(folder) if free else BUSY, device)
        if seen == BUSY:
            raise UserError(f"training: another process trains in '{folder}' and holds 'lock' there; wait, or end it.")
        if seen == FINISHED:
            trained = load_model(folder / "weights.safetensors").description.get("training_hash")
            if trained != training_hash:
                raise UserError(f"'{folder}' holds the finished run {trained}, expected {training_hash}.")
            return
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        with (
            explained() if run.training.compile else contextlib.nullcontext(),
            explained_shortage(run, world_size, device),
        ):
            training = Training(run, images, folder, training_hash, flip, device, preview, description, sharded)
            training.run_to_end(seen, start)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """One group of ranks at a time in a folder: rank 0 holds its lock, or yields False."""
    if _rank() != 0:
        yield True
        return
    with locked(folder / "lock", PATIENCE) as free:
        yield free


def _finished_or_seen(folder: Path) -> int:
    found = checkpoints.find(folder / "checkpoints")
    return FINISHED if is_finished(folder) else int(found[-1].stem) if found else 0


def _agree(number: int, device: torch.device) -> int:
    """What rank 0 says."""
    if not dist.is_initialized():
        return number
    agreed = torch.tensor(number, device=device)
    dist.broadcast(agreed, src=0)
    return int(agreed)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Training:
    """The state of one rank: network, average, optimiser. :func:`train` runs it to the end."""

    def __init__(
        self,
        run: Run,
        images: Images,
        folder: Path,
        training_hash: str,
        flip: bool,
        device: torch.device,
        preview: Preview | None,
        description: Mapping[str, Any] | None = None,
        sharded: bool = False,
    ) -> None:
        self.run, self.images, self.folder, self.hash = run, images, folder, training_hash
        self.flip, self.device, self.preview = flip, device, preview
        self.rank, self.world_size = _rank(), dist.get_world_size() if dist.is_initialized() else 1
        self.groups = run.training.groups_on(self.world_size)
        self.total = training_images(run)
        self.description = {
            **(description or {}),
            "run": run.describe(),
            "training_hash": training_hash,
            "images": self.total,
        }
        torch.manual_seed(derive_seed(run.seed, "weights"))
        network = build_network(run.model, len(run.turning_points), run.training.activation_checkpointing)
        average, here = None, run
        self.sharded = sharded and self.world_size > 1
        if self.sharded:
            if run.training.batch_fit:
                raise UserError(
                    "training.batch_fit: found true beside cluster.shard, expected false, as ranks that gather shares"
                    " for each part cannot try other parts; set training.accumulation instead."
                )
            # Shares are cast as they are gathered, and a stage is compiled without what gathers it.
            here = replace(run, training=replace(run.training, precision="fp32", compile=False))
            average = copy.deepcopy(network)
            if run.training.compile:
                compile_network(*ranks.stages(network))
            for each in (network, average):
                ranks.shard(each, device, run.training.precision)
            self.network: nn.Module = network
        else:
            self.network = arrange(network, device)
        self.computing = Computing(self.network, here.training.precision)
        self.ema = EMA(self.network, run.training.ema_halflife_images, run.training.ema_ramp, average)
        self._model = TrainedModel.of(here, self.description, self.ema.network, device)
        self.process = self._model.process
        self.spans = training_spans(run, self.process.schedule)
        self.optimizers = build_optimizers(self.network, run.training)
        self.learning_rate = run.training.learning_rate
        if here.training.compile:
            compile_network(self.computing.network)
        self.live: nn.Module = self.computing.network
        self.part_size = PartSize(run, device, self.world_size)
        if self.world_size > 1 and not self.sharded and not run.training.batch_fit:
            self.live = ranks.replicate(self.live, device)
        settings, self.graphs = run.training, None
        # What is not captured: an exchange between ranks, states of generators, memory that runs out.
        one_by_one = self.world_size > 1 or settings.activation_checkpointing or settings.batch_fit
        if device.type == "cuda" and self.computing.copies and not one_by_one:
            self.graphs = PartGraphs(self.computing.copies)
        # Since the last log: the losses of each level's images and, last, the gradient norms; their sums and numbers.
        self.window = torch.zeros(2, self.process.levels + 2, dtype=torch.float64, device=device)

    @property
    def model(self) -> TrainedModel:
        """The averaged weights as they are now, to draw with."""
        self._model.refresh()
        return self._model

    def run_to_end(self, seen: int, start: Path | None = None) -> None:
        """Train, log, preview, checkpoint; then write the weights.

        Args:
            seen: images of the checkpoint to go on from; 0 to start.
            start: see :func:`train`.
        """
        settings, folder = self.run.training, self.folder
        self.part_size.keep_in(folder)
        if seen:
            self._resume(seen)
        else:
            if self.run.training.start is not None:
                weights = starting_weights(self.run, start or Path(self.run.training.start))
                for network in (self.network, self.ema.network):
                    checkpoints.load(network, weights)
            self._estimate()
        if self.rank == 0:
            ledger.truncate(folder / "metrics.jsonl", seen)
        batches = self._batches(seen // settings.batch)
        batch = next(batches, None)
        clock, clocked = time.perf_counter(), seen
        while batch is not None:
            self.step(seen // settings.batch, *batch)
            before, seen = seen, seen + settings.batch
            self.ema.update(seen, settings.batch)
            # A GPU is still at work on the step: the next batch is read and copied before anything waits for it.
            batch = next(batches, None)

            def due(every: int, before: int = before, seen: int = seen) -> bool:
                return every > 0 and (seen // every > before // every or seen == self.total)

            if due(settings.log_images):
                rate = (seen - clocked) / (time.perf_counter() - clock)
                self._log(seen, rate)
                clock, clocked = time.perf_counter(), seen
            # All ranks draw with what is spread over them.
            if self.preview and (self.rank == 0 or self.sharded) and due(settings.preview_images):
                paused = time.perf_counter()
                self._preview(seen, self.preview)
                clock += time.perf_counter() - paused
            if due(settings.checkpoint_images):
                self._checkpoint(seen)
        weights = ranks.gather(self.ema.network.state_dict())
        if self.rank == 0:
            save_model(folder / "weights.safetensors", weights, self.description)
        if self.world_size > 1:
            # No rank leaves before the result is there.
            dist.barrier()

    def _batches(self, start_step: int) -> Iterator[Batch]:
        """Of all steps from this one to the last."""
        infinite = training_batches(
            self.images,
            batch=self.run.training.batch,
            seed=self.run.seed,
            start_step=start_step,
            rank=self.rank,
            world_size=self.world_size,
            flip=self.flip,
            workers=self.run.training.loader_workers,
        )
        return to_device(islice(infinite, self.total // self.run.training.batch - start_step), self.device)

    def step(self, step: int, images: Tensor, labels: Tensor | None = None) -> None:
        """Step number ``step`` (from 0) on this rank's images: all that is random in it comes from the number.

        Args:
            images, labels: as in :meth:`update`.
        """
        self.learning_rate = self._learning_rate(step)
        self.part_size.seen = step * self.run.training.batch
        torch.manual_seed(derive_seed(self.run.seed, "step", step, self.rank))
        self.update(images, self._counts(step), labels, step)

    def _counts(self, step: int) -> list[int]:
        """Images of each level, finest first, that this rank has at a step."""
        settings = self.run.training
        each = level_counts(self.spans, settings.levels, self.run.seed, step, images=settings.batch // self.groups)
        return [count * (self.groups // self.world_size) for count in each]

    def _learning_rate(self, step: int) -> float:
        """Of a step: rises over the warm-up, falls over the cool-down."""
        settings = self.run.training
        before, after = step * settings.batch, (step + 1) * settings.batch
        up = after / settings.warmup_images if settings.warmup_images else 1.0
        down = (self.total - before) / (settings.cooldown * self.total) if settings.cooldown else 1.0
        return settings.learning_rate * min(1.0, up, down)

    def update(self, images: Tensor, counts: Sequence[int], labels: Tensor | None = None, step: int = 0) -> None:
        """One step of the optimisers at :attr:`learning_rate`; nothing is synchronised.

        Args:
            images: of this rank, uint8 (b, 3, H, W).
            counts: how many of them to take for each level, finest first.
            labels: (b,) their classes, -1 for none; needed by a class-conditional network.
            step: its number, from which timesteps and noise are drawn.

        Raises:
            UserError: there is no such class, or no labels for a class-conditional network.
        """
        classes = self.run.model.num_classes
        if classes and labels is not None and not -1 <= labels.min() <= labels.max() < classes:
            raise UserError(
                f"labels: found {int(labels.min())} to {int(labels.max())}, expected -1 (none) to {classes - 1}, as"
                f" model.num_classes is {classes}; change one of them."
            )
        self.computing.zero_grad()
        self.computing.refresh()
        self._gradients(images, counts, labels, step)
        norm = ranks.whole(nn.utils.clip_grad_norm_(self.network.parameters(), self.run.training.clip_norm))
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.learning_rate
            optimizer.step()
        self.window[:, -1] += torch.stack([norm.detach(), torch.ones_like(norm)])

    def _gradients(self, images: Tensor, counts: Sequence[int], labels: Tensor | None, step: int) -> None:
        """Gradients of a step, the mean over ranks; with ``batch_fit`` in parts that fit into the memory of all."""
        passes = partial(self._backward, self.live, images, counts, labels, step)
        if not self.run.training.batch_fit:
            passes()
            return
        window = self.window.clone()
        while not self.part_size.fits(passes):
            self.computing.zero_grad()
            self.window.copy_(window)
            release()
            torch.manual_seed(torch.initial_seed())  # Dropout draws again what it has drawn.
        if self.world_size > 1:
            average_gradients(self.network)

    def _backward(
        self, network: nn.Module, images: Tensor, counts: Sequence[int], labels: Tensor | None = None, step: int = 0
    ) -> None:
        """Gradients of the mean loss of a batch."""
        images = images.to(self.device, non_blocking=True)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        whose: dict[str, int] = {
            "seed": self.run.seed, "step": step,
            "rank": self.rank, "world_size": self.world_size, "groups": self.groups,
        }  # fmt: skip
        drawn = draw(self.spans, counts, self.run.resolution, self.device, **whose)
        if labels is not None and self.run.training.label_dropout:
            labels = drop_labels(labels, counts, self.run.training.label_dropout, **whose)
        taken = parts(counts, self.part_size.now)
        for i, (level, places) in enumerate(taken):
            part = images[places]
            # Ranks exchange gradients once a step, after the last part.
            quiet: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(network, DistributedDataParallel) and i < len(taken) - 1:
                quiet = network.no_sync()
            passes = partial(self._pass, network, level, len(part) / len(images))
            inputs = part, *drawn.of(level, places), None if labels is None else labels[places]
            with quiet, part_of(level, len(part)):
                if self.graphs is None:
                    loss = passes(*inputs)
                else:
                    kept = len(part) * activation_bytes(self.run, level, gpu=True)
                    loss = self.graphs.run((level, len(part), len(images)), passes, inputs, kept)
            if i == len(taken) - 1 or not isinstance(network, DistributedDataParallel):
                # In fp32, in which many parts add up.
                self.computing.collect()
            self.window[0, level] += loss * len(part)
            self.window[1, level] += len(part)

    def _pass(self, network: nn.Module, level: int, share: float, *inputs: Any) -> Tensor:
        """The loss of a part of a step, which leaves the gradients of ``share`` times it."""
        loss = self._loss(network, level, *inputs)
        (loss * share).backward()
        return loss.detach()

    def _loss(
        self,
        network: nn.Module,
        level: int,
        images: Tensor,
        t: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Mean loss of images, uint8 (b, 3, H, W), at timesteps (b,) of a level, with noise of its resolution."""
        x, wanted = example(self.process, self.run.model.prediction_type, level, t, to_float(images), noise)
        return F.mse_loss(network(x, t, level, labels).float(), wanted)

    def _estimate(self) -> None:
        size, side = self.run.training.batch // self.world_size, self.run.resolution
        # Nothing is read: whoever goes on from here reads what an undisturbed run would.
        batch = Batch(torch.zeros((size, 3, side, side), dtype=torch.uint8), torch.full((size,), -1))
        seconds = self.time_steps(repeat(batch)) * self.total / self.run.training.batch
        self.optimizers = build_optimizers(self.network, self.run.training)
        self.window.zero_()
        if self.rank:
            return
        expected = Estimate(
            self.total,
            training_flops(self.run),
            seconds,
            worker_memory(
                cut_to(self.run, self.world_size, self.part_size.now),
                self.world_size,
                self.device.type == "cuda",
                self.sharded,
            ),
            run_bytes(self.run),
        )
        write_atomically(self.folder / "estimate.json", json.dumps(asdict(expected), indent=2) + "\n")
        logger.info("%s: %s", self._name(), expected.sentence())

    def time_steps(self, batches: Iterator[Batch]) -> float:
        """Seconds of a step, the mean over the levels where a step has one; see :meth:`idle_step`."""
        return sum(
            share * median_seconds(partial(self.idle_step, batches, counts), self.device)
            for share, counts in self.step_kinds()
        )

    def step_kinds(self) -> list[tuple[float, list[int]]]:
        """The kinds of steps: the share of steps that are so, and images at each level."""
        settings = self.run.training
        size = settings.batch // self.world_size
        if settings.levels == "all":
            return [(1.0, self._counts(0))]
        levels = range(self.process.levels + 1)
        return [(share, [size if k == i else 0 for k in levels]) for i, share in enumerate(self.spans.shares())]

    def idle_step(self, batches: Iterator[Batch], counts: Sequence[int]) -> None:
        """A step of training at a learning rate of 0: weights stay as they are, the optimisers' moments do not."""
        self.learning_rate = 0.0
        images, labels = next(batches)
        self.update(images, counts, labels)
        self.ema.update(self.run.training.batch, self.run.training.batch)

    def _log(self, seen: int, rate: float) -> None:
        window = self.window.clone()
        if self.world_size > 1:
            dist.all_reduce(window)
        self.window.zero_()
        sums, counts = window.cpu()
        metrics: dict[str, float] = {}
        weighted = 0.0
        shares = self.spans.shares()
        present = [level for level in range(self.process.levels + 1) if counts[level]]
        for level in present:
            metrics[f"loss/level_{level}"] = (sums[level] / counts[level]).item()
            weighted += shares[level] * metrics[f"loss/level_{level}"]
        metrics["loss"] = weighted / sum(shares[level] for level in present)
        metrics["gradient_norm"] = (sums[-1] / counts[-1]).item()
        if not torch.isfinite(sums[:-1]).all():
            raise UserError(
                f"loss: found {metrics['loss']} after {seen:,} images of {self._name()}, expected a finite number;"
                " lower training.learning_rate or clip_norm, or use fp32."
            )
        metrics["learning_rate"] = self.learning_rate
        metrics["images_per_second"] = rate
        metrics["tflops_per_second"] = 3 * mean_flops(self.run) * rate / 1e12
        metrics["memory_gib"] = peak_memory(self.device) / 2**30
        if self.rank == 0:
            ledger.append(self.folder / "metrics.jsonl", seen, metrics)
            left = (self.total - seen) / rate
            name, images = self._name(), f"{seen:,} / {self.total:,} images"
            text = "%s: %s, loss %.4f, %.0f images/s, %.2f GiB, %.0f s left"
            logger.info(text, name, images, metrics["loss"], rate, metrics["memory_gib"], left)

    def _checkpoint(self, seen: int) -> None:
        if self.world_size > 1:
            # Rank 0 takes over what all have summed, so that a resumed run logs the same losses.
            dist.all_reduce(self.window)
            if self.rank:
                self.window.zero_()
        tensors = ranks.gather(
            {
                **checkpoints.pack("model", self.network),
                **checkpoints.pack("ema", self.ema.network),
                **pack_optimizers(self.optimizers),
                "window": self.window,
            }
        )
        if self.rank == 0:
            checkpoints.write(
                self.folder / "checkpoints",
                checkpoints.Checkpoint(seen, tensors),
                self.hash,
                self.run.training.keep_checkpoints,
            )

    def _resume(self, seen: int) -> None:
        path = checkpoints.path(self.folder / "checkpoints", seen)
        checkpoint = checkpoints.read(path, self.hash)
        checkpoints.unpack("model", self.network, checkpoint.tensors)
        checkpoints.unpack("ema", self.ema.network, checkpoint.tensors)
        unpack_optimizers(self.optimizers, checkpoint.tensors)
        if self.rank == 0:
            self.window.copy_(checkpoint.tensors["window"])
            logger.info("%s: going on after %s of %s images", self._name(), f"{seen:,}", f"{self.total:,}")

    def _preview(self, seen: int, show: Preview) -> None:
        model, count = self.model, self.run.training.preview_count
        options = self.run.sampling.options(self.run.training.preview_steps)

        def draw_some(first: int, size: int) -> Tensor:
            return model.draw(size, first, options).cpu()

        parts = in_batches(draw_some, 0, count, count, self.device, "training.preview_count")
        drawn = torch.cat([samples for _, samples in parts])
        if self.rank == 0:
            show(seen, drawn, self.folder / "previews" / f"{seen:09d}.png")

    def _name(self) -> str:
        return f"{self.run.setting} seed {self.run.seed}"
