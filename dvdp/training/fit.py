"""``training.batch_fit``: parts of a step that fit into memory, found by trying.

Where a part runs out of memory, on any rank, all ranks drop the step's gradients, cut the step into smaller parts, and
do it again from its start with the same random draws. So a step is what it would have been with those parts from the
beginning. Ranks exchange gradients after all parts, once all have said that theirs fit: none waits for one that failed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dvdp.config import Run
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.out_of_memory import ran_out
from dvdp.training.shortage import Shortage, sentence

logger = logging.getLogger("dvdp.training")

#: In a run's folder: from which number of images seen on, how many images of full size a part has at most.
FILE = "parts.json"
#: Bytes of gradients in one message between ranks.
MESSAGE = 25 * 2**20
_ENOUGH = Shortage(-2, 0, 0, 0, 0)


class PartSize:
    """Images of full size in a part of a step, at most: those of the params until memory runs out."""

    def __init__(self, run: Run, device: torch.device, world_size: int) -> None:
        self.seen = 0
        """Images before the step at hand."""
        self._run, self._device, self._world_size = run, device, world_size
        self._first = math.ceil(run.training.batch // world_size / run.training.accumulation)
        self._found: dict[int, int] = {}
        self._file: Path | None = None
        # Of the hosts: a GPU need not be waited for to hear that a rank has no memory.
        self._hosts: dist.ProcessGroup | None = None
        if world_size > 1 and run.training.batch_fit:
            self._hosts = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    @property
    def now(self) -> int:
        """At the step at hand."""
        return next((size for seen, size in reversed(self._found.items()) if seen <= self.seen), self._first)

    def start_with(self, size: int) -> None:
        """In place of what the params say."""
        self._first, self._found = size, {}

    def keep_in(self, folder: Path) -> None:
        """Go by what was found before the run was interrupted, and write what is found from now on."""
        if not self._run.training.batch_fit:
            return
        self._file = folder / FILE
        known = json.loads(self._file.read_text()) if self._file.is_file() else []
        if self._hosts is not None:
            # On a shared file system other ranks may not see it yet.
            said = [known]
            dist.broadcast_object_list(said, src=0, group=self._hosts)
            known = said[0]
        self._found = dict(known)

    def fits(self, passes: Callable[[], None]) -> bool:
        """Do a step's passes, without an exchange between ranks; False if memory ran out on any.

        Parts are smaller then; what the passes have left is the caller's to drop.

        Raises:
            UserError: not even one image at a time fits; on all ranks alike.
        """
        found = self._of_ranks(self._try(passes))
        if all(each == _ENOUGH for each in found):
            return True
        rank, worst = next((rank, each) for rank, each in enumerate(found) if each != _ENOUGH)
        before, gpu = self.now, self._device.type == "cuda"
        if before == 1:
            told = sentence(worst, self._run, self._world_size, gpu, before, rank)
            raise UserError(
                told.replace("training: memory ran out", "training: even with one image at a time, memory ran out", 1)
            )
        now = min(_halved(each, before) for each in found if each != _ENOUGH)
        self._found = {seen: size for seen, size in self._found.items() if seen < self.seen} | {self.seen: now}
        if self._file and (self._world_size == 1 or dist.get_rank() == 0):
            write_atomically(self._file, json.dumps(list(self._found.items())) + "\n")
        logger.warning(
            "%s seed %d: memory ran out at level %d with %d images at a time; from %s images on the batch of %d goes"
            " through the network in parts of at most %d images of full size, not %d",
            self._run.setting, self._run.seed, worst.level, worst.images, f"{self.seen:,}", self._run.training.batch,
            now, before,
        )  # fmt: skip
        return False

    def _try(self, passes: Callable[[], None]) -> Shortage:
        try:
            passes()
        except Exception as error:
            if not ran_out(error):
                raise
            return Shortage.of(error, self._device)
        return _ENOUGH

    def _of_ranks(self, found: Shortage) -> list[Shortage]:
        if self._hosts is None:
            return [found]
        own = torch.tensor(found)
        every = [torch.empty_like(own) for _ in range(self._world_size)]
        dist.all_gather(every, own, group=self._hosts)
        return [Shortage(*each.tolist()) for each in every]


def _halved(found: Shortage, before: int) -> int:
    """Images of full size for parts half as large as the one that did not fit."""
    failed = before if found.level < 0 else min(before, math.ceil(found.images / 4**found.level))
    return max(1, min(before - 1, math.ceil(failed / 2)))


def average_gradients(network: nn.Module) -> None:
    """Over all ranks, all of which have gradients of the same parameters."""
    for gradients in _messages([p.grad for p in network.parameters() if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _messages(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, grouped."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(each.nbytes for each in group) + tensor.nbytes > MESSAGE:
            yield group
            group = []
        group.append(tensor)
    yield group
