"""Bytes that training holds and writes, counted from sizes alone, which takes no torch; tests compare them with it."""

from __future__ import annotations

import math

from dvdp.config import ModelParams, Run
from dvdp.diffusion.spans import level_spans
from dvdp.models.flops import training_images
from dvdp.models.layout import FEW_PIXELS, Attention, Block, attention_heads, norm_groups, unet_layout

MIB = 2**20
#: Of a process that has trained a first step, without pages of files: Python, torch and what they load; measured with
#: torch 2.15 on a CPU.
LIBRARIES = 428 * MIB
#: Of Ray in a worker, beside that, and of what draws previews, without pages of files too.
RAY = 100 * MIB
#: Of oneDNN on a CPU, for every number of images that a level goes through the network with: it compiles kernels for
#: each. Measured on a CPU with AMX; the first in fp32 is in LIBRARIES.
KERNELS, KERNELS_BF16 = 4 * MIB, 15 * MIB
#: Bytes that glibc's allocator takes for a byte of activations, because of the holes between them; the second where
#: activations are computed again. Measured on glibc 2.36 in a worker's environment.
HOLES, HOLES_CHECKPOINTING = 1.45, 3.4
#: The same of CUDA's caching allocator, and what its context takes; assumed, not measured.
HOLES_GPU, CONTEXT_GPU = 1.1, 500 * MIB
#: Copies of a checkpoint's tensors while it is written, in memory that is not free already.
CHECKPOINT_COPIES = 1.2


def parameter_count(run: Run) -> int:
    """Of the network, or of the networks of all levels together."""
    return sum(_parameters(run))


def _parameters(run: Run) -> tuple[int, int]:
    """Those that Muon is for, and the others."""
    model, levels = run.model, len(run.turning_points) + 1
    width, embedding = model.model_channels, 4 * model.model_channels
    networks, rows = (levels, 1) if model.networks == "per_level" else (1, levels)
    rows += model.num_classes + 1 if model.num_classes else 0
    layers = [_layer_parameters(layer, embedding) for layer in unet_layout(model).layers]
    matrices = embedding * (width + embedding) + sum(of_layer for of_layer, _ in layers)
    # The first and the last convolution, and the norm before that.
    others = embedding * (2 + rows) + 28 * width + 29 * width * model.channel_mult[0] + 3
    return networks * matrices, networks * (others + sum(of_layer for _, of_layer in layers))


def _layer_parameters(layer: Block | Attention, embedding: int) -> tuple[int, int]:
    """Those that Muon is for, and the others."""
    if isinstance(layer, Attention):
        return 4 * layer.width**2, 6 * layer.width
    inputs, outputs, skip = layer.inputs, layer.width, int(layer.inputs != layer.width)
    return outputs * ((9 + skip) * inputs + 9 * outputs + 2 * embedding), 2 * inputs + (6 + skip) * outputs


def _largest_stage(run: Run) -> int:
    """Its parameters."""
    embedding = 4 * run.model.model_channels
    return max(
        sum(sum(_layer_parameters(layer, embedding)) for layer in stage) for stage in unet_layout(run.model).stages
    )


def optimizer_bytes(run: Run) -> int:
    """Two moments a parameter of AdamW, one of Muon."""
    matrices, others = _parameters(run)
    return 4 * ((1 if run.training.optimizer == "muon" else 2) * matrices + 2 * others)


def checkpoint_bytes(run: Run) -> int:
    """Network, average and optimiser; headers, some 100 bytes a tensor, are left out."""
    return 8 * parameter_count(run) + optimizer_bytes(run)


def run_bytes(run: Run) -> int:
    """What a finished run leaves on disk: checkpoints, weights and samples, without pictures and logs."""
    written = math.ceil(training_images(run) / run.training.checkpoint_images)
    kept = min(run.training.keep_checkpoints, written) * checkpoint_bytes(run)
    return kept + 4 * parameter_count(run) + run.sampling.count * 3 * run.resolution**2


def worker_memory(run: Run, ranks: int, gpu: bool, sharded: bool = False) -> int:
    """Peak of one training worker: of its GPU, else of its process, Ray's part included and pages of files left out.

    See :func:`dvdp.training.estimate.peak_memory`. On a GPU it is not measured.
    """
    weights, settings = 4 * parameter_count(run), run.training
    groups = ranks if settings.groups == "auto" else max(ranks, settings.groups)
    # Of a group, of which a rank has several.
    images, several = math.ceil(settings.batch / groups), math.ceil(groups / ranks)
    at_once = math.ceil(images * several / settings.accumulation)
    activations: float = 0
    batches, drawn = 0, 0.0
    spans = level_spans(run.turning_points, run.schedule.timesteps)
    alike = -(-run.schedule.timesteps // len(spans)) if run.at_all_timesteps else 0
    for level, (low, high) in enumerate(spans):
        # The most that a step has of this level, and how many of them go through the network at once.
        share = images * (alike or high - low) if settings.levels == "all" else images * run.schedule.timesteps
        most = several * -(-share // run.schedule.timesteps)
        batches += 2 if share % run.schedule.timesteps else 1
        part = math.ceil(most / math.ceil(most / (at_once * 4**level)))
        full = most / 4**level
        drawn = drawn + full if settings.levels == "all" else max(drawn, full)
        activations = max(activations, part * activation_bytes(run, level, gpu))
    # Network, average, gradients, optimiser.
    state: float = 3 * weights + optimizer_bytes(run)
    if sharded and ranks > 1:
        # And weights and gradients of a stage that computes, and of the one before or after it.
        state = state / ranks + 16 * _largest_stage(run)
    elif settings.precision == "bf16":
        # Copies of the weights, and their gradients until they are added to those in fp32.
        state += weights
    # The noise of the images that wait for their part.
    state += round(12 * run.resolution**2 * max(0, drawn - at_once))
    if gpu:
        return round(CONTEXT_GPU + state + HOLES_GPU * activations)
    holes = HOLES_CHECKPOINTING if settings.activation_checkpointing else HOLES
    kernels = KERNELS_BF16 * batches if settings.precision == "bf16" else KERNELS * (batches - 1)
    libraries = LIBRARIES + RAY + kernels
    return round(libraries + state + holes * activations + CHECKPOINT_COPIES * checkpoint_bytes(run))


def activation_bytes(run: Run, level: int, gpu: bool) -> int:
    """What one image of a level leaves in memory for the backward pass."""
    model, resolution, size = run.model, run.resolution >> level, 2 if run.training.precision == "bf16" else 4
    stages, pixels, width = unet_layout(model).stages, resolution**2, model.model_channels
    kept = [sum(_kept(layer, model, resolution, size, gpu) for layer in stage) for stage in stages]
    if run.training.activation_checkpointing:
        outputs = (stage[-1].width * stage[-1].pixels(resolution)[1] for stage in stages[:-1])
        return size * (width * pixels + sum(outputs)) + max(kept)
    # Sinusoids, what goes into both linear layers and into the modulations, and into both SiLUs, one of them in fp32.
    embedding = width * (size * (1 + 4 + 4 + 4) + 4 * 4)
    last = width * model.channel_mult[0]
    ends = _normalised(last, pixels, size, gpu) + size * (3 + last) * pixels
    return embedding + sum(kept) + ends


def _kept(layer: Block | Attention, model: ModelParams, resolution: int, size: int, gpu: bool) -> int:
    """Bytes of an image that a layer leaves, at ``size`` bytes a number: an operation keeps its input."""
    before, after = layer.pixels(resolution)
    if isinstance(layer, Attention):
        values, heads = layer.width * before, attention_heads(layer.width, model.num_head_channels)
        # The first convolution's input, q, k, v and what comes out, which is copied for the last one if heads are many.
        whole = size * (6 if heads > 1 and not gpu else 5) * values + 4 * heads * before
        if gpu and size == 2 and (missing := -(layer.width // heads) % 8):
            # Flash attention takes heads of whole eights.
            whole += size * (values + 4 * heads * missing * before)
        if size == 2 and not gpu and before <= FEW_PIXELS:
            # Not fused, the weights are kept, and no copy is made; of one head, k and v stay as views of q's storage.
            whole = size * ((5 if heads > 1 else 6) * values + heads * before**2)
        # No SiLU follows the norm.
        return _normalised(layer.width, before, size, gpu) - (0 if gpu else size * values) + whole
    inputs, outputs = layer.inputs * before, layer.width * after
    kept = _normalised(layer.inputs, before, size, gpu) + _normalised(layer.width, after, size, gpu)
    # The convolutions' inputs; scale and shift, or the scale and what it multiplies.
    kept += size * (layer.inputs * (before if layer.resample == "up" else after) + outputs)
    kept += size * (2 * layer.width if gpu else layer.width + outputs)
    if model.dropout:
        kept += outputs * (1 if gpu else size)
    if gpu and layer.resample == "down":
        kept += size * inputs  # Pooling keeps its input where it is no sum of rows.
    return kept


def _normalised(width: int, pixels: int, size: int, gpu: bool) -> int:
    """What group norm and the SiLU after it keep: their inputs, and mean and deviation of each group.

    On a GPU they are one operation, which keeps both for every channel.
    """
    return size * width * pixels + 8 * width if gpu else 2 * size * width * pixels + 8 * norm_groups(width)
