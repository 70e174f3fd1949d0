"""Bytes that training holds and writes, counted from shapes alone: nothing is run, and no weights are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from dvdp.config import ModelParams, Run
from dvdp.models.unet import UNet, build_network
from dvdp.training.levels import level_counts, parts
from dvdp.training.optimizer import matrices

MIB = 2**20
#: Of a process that has trained a first step: Python, torch and what they load; measured with torch 2.15 on a CPU.
LIBRARIES = 775 * MIB
#: Of Ray in a worker, beside that, and of what draws previews.
RAY = 190 * MIB
#: Bytes that glibc's allocator takes for a byte of activations, because of the holes between them; the second where
#: activations are computed again. Measured on glibc 2.36 in a worker's environment.
HOLES, HOLES_CHECKPOINTING = 1.45, 3.4
#: The same of CUDA's caching allocator, and what its context takes; assumed, not measured.
HOLES_GPU, CONTEXT_GPU = 1.1, 500 * MIB
#: Copies of a checkpoint's tensors while it is written, in memory that is not free already.
CHECKPOINT_COPIES = 1.2
#: Images of the counted pass, so that what does not grow with them hardly counts.
_IMAGES = 16
#: How torch draws weights.
_DRAWN = {"normal_", "uniform_", "kaiming_uniform_"}
#: What autocast casts to bf16.
_LOW = {"conv2d", "conv_transpose2d", "linear"}


@lru_cache(maxsize=64)
def _network(model: ModelParams, levels: int) -> nn.Module:
    with torch.device("meta"), _Uninitialised():
        return build_network(model, levels)


def parameter_count(run: Run) -> int:
    """Of the network, or of the networks of all levels together."""
    return sum(p.numel() for p in _network(run.model, len(run.turning_points)).parameters())


def optimizer_bytes(run: Run) -> int:
    """Two moments a parameter of AdamW, one of Muon."""
    network = _network(run.model, len(run.turning_points))
    muon = sum(p.numel() for p in matrices(network)) if run.training.optimizer == "muon" else 0
    return 4 * (2 * (parameter_count(run) - muon) + muon)


def checkpoint_bytes(run: Run) -> int:
    """Network, average and optimiser; headers, some 100 bytes a tensor, are left out."""
    return 8 * parameter_count(run) + optimizer_bytes(run)


def run_bytes(run: Run) -> int:
    """What a finished run leaves on disk: checkpoints, weights and samples, without pictures and logs."""
    from dvdp.models.flops import training_images

    written = math.ceil(training_images(run) / run.training.checkpoint_images)
    kept = min(run.training.keep_checkpoints, written) * checkpoint_bytes(run)
    return kept + 4 * parameter_count(run) + run.sampling.count * 3 * run.resolution**2


def worker_memory(run: Run, ranks: int, gpu: bool) -> int:
    """Peak of one training worker: of its GPU, else of its process, Ray's part included.

    On a CPU it was within 10 % of what small runs took (tests/training/test_memory.py); the larger the part of the
    activations, the less sure. On a GPU it is not measured.
    """
    weights, settings = 4 * parameter_count(run), run.training
    images = settings.batch // ranks
    if settings.levels == "all":
        steps = [level_counts(run.build_schedule(), "all", run.seed, 0, images)]
    else:
        levels = range(len(run.turning_points) + 1)
        steps = [[images if k == level else 0 for k in levels] for level in levels]
    at_once = math.ceil(images / settings.accumulation)
    activations = max(
        (places.stop - places.start) * activation_bytes(run, level, gpu)
        for counts in steps
        for level, places in parts(counts, at_once)
    )
    if settings.precision == "bf16":
        activations += weights / 2
    # Network, average, gradients, optimiser.
    state = 3 * weights + optimizer_bytes(run)
    if gpu:
        return round(CONTEXT_GPU + state + HOLES_GPU * activations)
    holes = HOLES_CHECKPOINTING if settings.activation_checkpointing else HOLES
    return round(LIBRARIES + RAY + state + holes * activations + CHECKPOINT_COPIES * checkpoint_bytes(run))


def activation_bytes(run: Run, level: int, gpu: bool) -> float:
    """What one image of a level leaves in memory for the backward pass."""
    low = run.training.precision == "bf16"
    kept, inputs, stage = _activations(run.model, run.resolution >> level, low, gpu)
    return inputs + stage if run.training.activation_checkpointing else kept


@lru_cache(maxsize=64)
def _activations(model: ModelParams, resolution: int, low: bool, gpu: bool) -> tuple[float, float, float]:
    """Bytes an image: all that is kept, the inputs of the stages, and the most that is kept within a stage."""
    with torch.device("meta"), _Uninitialised():
        network, t = _Staged(model), torch.empty(_IMAGES)
        x, labels = torch.empty(_IMAGES, 3, resolution, resolution), torch.zeros(_IMAGES, dtype=torch.long)
    notes = network.notes
    notes.ignore(*network.parameters())
    with saved_tensors_hooks(notes.keep, lambda tensor: tensor), _Autocast(notes, low, gpu):
        network(x, t, 0, labels)
    stages = [sum(stage.values()) for stage in notes.stages]
    everything = {key: size for stage in notes.stages for key, size in stage.items()}
    inputs = {key: size for key, size in notes.inputs.items() if key not in notes.ignored}
    return sum(everything.values()) / _IMAGES, sum(inputs.values()) / _IMAGES, max(stages) / _IMAGES


class _Uninitialised(TorchFunctionMode):
    """Leaves weights as they are: on a meta device torch imports its compiler, for seconds, to draw numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return None if getattr(func, "__name__", "") in _DRAWN else func(*args, **(kwargs or {}))


class _Notes:
    """Storages that the backward pass needs, by stage."""

    def __init__(self) -> None:
        self.stages: list[dict[int, int]] = [{}]
        self.inputs: dict[int, int] = {}
        self.ignored: set[int] = set()
        self._alive: list[Any] = []  # An address must not be used again.

    def ignore(self, *tensors: Tensor) -> None:
        self.ignored |= {self._key(tensor) for tensor in tensors}

    def keep(self, tensor: Tensor) -> Tensor:
        if (key := self._key(tensor)) not in self.ignored:
            self.stages[-1][key] = tensor.untyped_storage().nbytes()
        return tensor

    def begin(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs |= {self._key(tensor): tensor.untyped_storage().nbytes() for tensor in inputs}
        self.stages.append({})

    def _key(self, tensor: Tensor) -> int:
        self._alive.append(tensor.untyped_storage())
        return self._alive[-1]._cdata


class _Staged(UNet):
    """Notes what each stage keeps."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__(params)
        self.notes = _Notes()

    def _stage(self, layers: nn.Module, embedding: Tensor, *parts: Tensor) -> Tensor:
        self.notes.begin(parts)
        out = super()._stage(layers, embedding, *parts)
        self.notes.stages.append({})
        return out


class _Autocast(TorchFunctionMode):
    """What autocast to bf16 casts, which torch does not do on a meta device; and fused attention."""

    def __init__(self, notes: _Notes, low: bool, gpu: bool) -> None:
        super().__init__()
        self.notes, self.low, self.gpu = notes, low, gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self.low and name in _LOW:
            args = tuple(self._cast(value, torch.bfloat16) for value in args)
        elif self.low and self.gpu and name == "group_norm":
            args = tuple(self._cast(value, torch.float32) for value in args)
        elif name == "scaled_dot_product_attention":
            # Keeps what goes in and what comes out, and no matrix of weights.
            q, k, v = (self._cast(value, torch.bfloat16) if self.low else value for value in args[:3])
            out = q + k + v
            for tensor in (q, k, v, out):
                self.notes.keep(tensor)
            return out
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any, kind: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype == kind:
            return value
        cast = value.to(kind)
        if isinstance(value, nn.Parameter):
            self.notes.ignore(cast)
        return cast
