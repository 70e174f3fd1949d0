"""CUDA graphs of a step's parts: the host launches a part's forward and backward pass, some 1,400 kernels, as one.

A GPU does the parts of coarse levels, or of small images, in less time than the host takes to launch their kernels one
by one. A part is captured when its level comes with as many images for the third time: cuDNN has chosen its kernels and
Triton has compiled by then. The first replay is compared with what the same part computed without a graph. Where they
differ, where CUDA refuses the capture, or where memory is short, training goes on without graphs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger("dvdp.training")

#: Of a part, before it is captured.
RUNS_BEFORE = 2
#: Largest distance of gradients from those without a graph, as a share of their norm: kernels that add in any order
#: differ by some tenths of a percent in bf16.
TOLERANCE = 0.02
#: Share of the GPU's memory that a run may fill for its graphs' sake.
FILLED = 0.85

#: Computes a loss from tensors, and leaves gradients in the weights, which have none before.
Passes = Callable[..., Tensor]


class PartGraphs:
    """Runs parts of steps, by graphs once it has them.

    Args:
        weights: all that get gradients; :meth:`dvdp.models.compute.Computing.collect` takes these after each part.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._graphs: dict[Hashable, _Graph] = {}
        self._runs: Counter[Hashable] = Counter()
        self._refused = False
        self._pool: object = None
        # Bytes that graphs hold, of which those for activations are shared.
        self._activations = self._gradients = 0

    def run(self, key: Hashable, passes: Passes, inputs: Sequence[Tensor | None], activations: int) -> Tensor:
        """The loss of ``passes(*inputs)``, which leaves gradients.

        Args:
            key: equal for parts that differ in the numbers of their inputs alone.
            inputs: on the GPU; of the same sizes for a key.
            activations: bytes that the forward pass leaves for the backward pass.
        """
        if (graph := self._graphs.get(key)) is not None:
            return graph.replay(inputs)
        self._runs[key] += 1
        if self._refused or self._runs[key] <= RUNS_BEFORE or not self._fits(activations):
            return passes(*inputs)
        return self._capture(key, passes, inputs, activations)

    def _fits(self, activations: int) -> bool:
        """Whether a graph's memory fits beside what the run has needed at its peak, so that no other part lacks it."""
        _, total = torch.cuda.mem_get_info()
        gradients = self._gradients + sum(weight.nbytes for weight in self._weights)
        held = torch.cuda.max_memory_allocated() + gradients + max(self._activations, activations)
        return held <= FILLED * total

    def _capture(self, key: Hashable, passes: Passes, inputs: Sequence[Tensor | None], activations: int) -> Tensor:
        """The loss and gradients of the passes without a graph; from now on there is one, or there is none at all."""
        before = torch.cuda.get_rng_state()
        loss = passes(*inputs)
        gradients, after = self._take(), torch.cuda.get_rng_state()
        try:
            self._graphs[key] = graph = self._new(passes, inputs)
            # Dropout draws again what it has drawn.
            torch.cuda.set_rng_state(before)
            again = graph.replay(inputs)
            same = _alike([again], [loss]) and _alike(self._take(), gradients)
            refused = None if same else "a graph computes other gradients"
        except Exception as error:
            refused = str(error).strip().split("\n", 1)[0] or type(error).__name__
        torch.cuda.set_rng_state(after)
        if refused is None:
            self._activations = max(self._activations, activations)
            self._gradients += sum(gradient.nbytes for gradient in gradients if gradient is not None)
        else:
            logger.warning("training goes on without CUDA graphs, each kernel launched by the host: %s", refused)
            self._refused = True
            self._graphs.clear()
        self._put(gradients)
        return loss

    def _new(self, passes: Passes, inputs: Sequence[Tensor | None]) -> _Graph:
        own = [None if given is None else given.clone() for given in inputs]
        # One for all graphs: each replay begins with its inputs, so that they may share what lies between.
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        try:
            loss, replay = capture(lambda: passes(*own), self._pool)
        finally:
            gradients = self._take()
        return _Graph(own, loss, gradients, replay, self._put)

    def _take(self) -> list[Tensor | None]:
        """The gradients, which the weights have no more."""
        taken = [weight.grad for weight in self._weights]
        self._put([None] * len(taken))
        return taken

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient


class _Graph:
    """A captured part with the memory that it reads its inputs from and writes loss and gradients to."""

    def __init__(
        self,
        inputs: Sequence[Tensor | None],
        loss: Tensor,
        gradients: Sequence[Tensor | None],
        launch: Callable[[], None],
        put: Callable[[Sequence[Tensor | None]], None],
    ) -> None:
        self._inputs, self._loss, self._gradients, self._launch, self._put = inputs, loss, gradients, launch, put

    def replay(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """The loss for other inputs; weights have their gradients, which the next replay overwrites."""
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self._launch()
        self._put(self._gradients)
        return self._loss


def capture(work: Callable[[], Tensor], pool: object) -> tuple[Tensor, Callable[[], None]]:
    """What ``work`` returns, in the memory that is written anew by each call of the second.

    Args:
        pool: of memory, from ``torch.cuda.graph_pool_handle``.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads send the next images meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
        out = work()
    return out, graph.replay


@torch.no_grad()
def _alike(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether the same of them are there, and their numbers are close."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    if len(pairs) < sum(each is not None for each in (*found, *expected)) / 2:
        return False
    wanted = [e for _, e in pairs]
    apart, size = (
        torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).norm()
        for tensors in (torch._foreach_sub([f for f, _ in pairs], wanted), wanted)
    )
    return bool(apart <= TOLERANCE * size)
