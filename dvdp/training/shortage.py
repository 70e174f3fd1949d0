"""What is said where training runs out of memory: where, what there was, the estimate beside it, what to change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from dvdp.config import Run
from dvdp.errors import UserError
from dvdp.out_of_memory import OutOfMemory, free_and_total, ran_out, there
from dvdp.training.estimate import peak_memory
from dvdp.training.memory import CONTEXT_GPU, worker_memory


class PartTooLarge(Exception):  # noqa: N818
    """A part of a step for which there was no memory; raised from what says so."""

    def __init__(self, level: int, images: int) -> None:
        super().__init__(f"no memory for {images} images of level {level}")
        self.level, self.images = level, images


@contextlib.contextmanager
def part_of(level: int, images: int) -> Iterator[None]:
    """Within it, memory that runs out raises :class:`PartTooLarge`."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise PartTooLarge(level, images) from error


class Shortage(NamedTuple):
    """Where memory ran out, and what there was of it, in bytes."""

    level: int
    """-1 outside the network's passes."""
    images: int
    """Of the part."""
    free: int
    total: int
    peak: int
    """Of this process, on its GPU or in RAM, with what :func:`dvdp.training.memory.worker_memory` counts."""

    @staticmethod
    def of(error: BaseException, device: torch.device) -> Shortage:
        """Of an exception that is for want of memory."""
        part = (error.level, error.images) if isinstance(error, PartTooLarge) else (-1, 0)
        peak = peak_memory(device) + (CONTEXT_GPU if device.type == "cuda" else 0)
        return Shortage(*part, *free_and_total(device), peak)


def cut_to(run: Run, ranks: int, at_once: int) -> Run:
    """A run with the accumulation whose parts have so many images of full size, at most."""
    accumulation = math.ceil(run.training.batch // ranks / at_once)
    return replace(run, training=replace(run.training, accumulation=accumulation))


def sentence(found: Shortage, run: Run, ranks: int, gpu: bool, at_once: int, rank: int = 0) -> str:
    """For people.

    Args:
        at_once: images of full size in a part, at most.
    """
    settings = run.training
    where = "outside the network's passes (data, optimizer, EMA, preview or checkpoint)"
    if found.level >= 0:
        images = "1 image" if found.images == 1 else f"{found.images} images"
        where = f"at level {found.level}, in a part of {images}"
    if ranks > 1:
        where += f" of rank {rank}"
    estimated = worker_memory(cut_to(run, ranks, at_once), ranks, gpu)
    help_by = []
    if not settings.batch_fit and found.level >= 0 and at_once > 1:
        help_by.append("set training.batch_fit to true, which goes on with the same batch in smaller parts")
    if not settings.activation_checkpointing and found.level >= 0:
        help_by.append("set training.activation_checkpointing to true")
    if at_once > 1 and found.level >= 0:
        help_by.append("raise training.accumulation")
    help_by.append("use a smaller network or a device with more memory")
    ways = f"{', '.join(help_by[:-1])}, or {help_by[-1]}" if len(help_by) > 1 else help_by[0]
    return (
        f"training: memory ran out {where}, with training.batch {settings.batch}, accumulation {settings.accumulation},"
        f" activation_checkpointing {str(settings.activation_checkpointing).lower()} and batch_fit"
        f" {str(settings.batch_fit).lower()}; {there(found.free, found.total, gpu)}; the worker held"
        f" {found.peak / 2**30:.2f} GiB at most, where {estimated / 2**30:.2f} were estimated; {ways}."
    )


@contextlib.contextmanager
def explained(run: Run, ranks: int, device: torch.device) -> Iterator[None]:
    """Within it, memory that runs out raises OutOfMemory with :func:`sentence`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not ran_out(error):
            raise
        at_once = math.ceil(run.training.batch // ranks / run.training.accumulation)
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        found, gpu = Shortage.of(error, device), device.type == "cuda"
        raise OutOfMemory(sentence(found, run, ranks, gpu, at_once, rank), gpu) from error
