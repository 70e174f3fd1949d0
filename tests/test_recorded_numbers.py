"""Numbers recorded once: weights, losses, samples, scores and plans that a change of code alone must not move.

Every case is a fixed computation on the CPU: tiny networks, random images of 16 px, one thread. What it gives is kept
in ``recorded_numbers.json`` as a SHA-256 and a few statistics. On the machine of the recording (:func:`machine`) the
bytes must be the same where the case says ``"exact": true``; with ``"exact": false`` the statistics must agree within
:data:`SAME_MACHINE`, or ``"within"`` where the case has it, which is for changes that only round otherwise (of a
network's samples in float32, and of Muon, whose products in bf16 magnify it). On any other machine they must agree
within the tolerance of the group, as other kernels add in another order.

    export PYTHONPATH=.
    python tests/test_recorded_numbers.py --write             write the file again; a case keeps its "exact"
    python tests/test_recorded_numbers.py --dump FILE.npz     keep every number, not the statistics alone
    python tests/test_recorded_numbers.py --against FILE.npz  tell each case's greatest difference from a dump
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

# ---- The library, all of it: adapters, so that a renaming touches nothing below them. --------------------------------
from dvdp import Process, Schedule
from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.data.moments import Moments
from dvdp.diffusion import bands
from dvdp.diffusion.randomness import ImageNoise, derive_seed
from dvdp.diffusion.sampling import sample
from dvdp.diffusion.timesteps import step_grid
from dvdp.models.classes import Classes
from dvdp.models.denoiser import NetworkDenoiser, example
from dvdp.models.export import load_model
from dvdp.models.flops import mean_flops, relative_flops, training_images
from dvdp.models.unet import build_network
from dvdp.planning import planner as planning
from dvdp.planning.planner import Planner, lift_losses
from dvdp.planning.search import candidate_points, frontier, search
from dvdp.training import ledger
from dvdp.training.levels import level_counts
from dvdp.training.loop import train
from tests.logs import InterruptedHere, stop_after

# What the cases call things -> what the library calls them.
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
VARIANCES = {"small": "fixed_small", "large": "fixed_large"}


def make_run(
    process: str,
    turning_points: Sequence[int],
    prediction: str = "v",
    networks: str = "shared",
    classes: int = 0,
    dropout: float = 0.0,
    checkpointing: bool = False,
    images: int = 40,
    sampling: Mapping[str, Any] | None = None,
    **training: Any,
) -> Run:
    """A run; ``sampling`` is in the arguments of :func:`draw`, ``training`` in those of params.yaml."""
    options = {
        "batch": 8,
        "warmup_images": 16,
        "log_images": 16,
        "checkpoint_images": 24,
        "preview_images": 0,
        # All that shapes weights is said here, so that other defaults change no number.
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "cooldown": 0.0,
        "ema_halflife_images": 20_000,
        "precision": "fp32",
    }
    tree = {
        "dataset": {"resolution": SIZE},
        "schedule": {},
        "settings": {"recorded": {"process": process, "turning_points": list(turning_points)}},
        "model": {
            "prediction_type": PREDICTIONS[prediction],
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_factors": [2],
            "num_head_channels": 8,
            "dropout": dropout,
            "networks": networks,
            "num_classes": classes,
        },
        "training": {
            "images": images,
            "budget": "images",
            "activation_checkpointing": checkpointing,
            **options,
            **training,
        },
        "sampling": _sampling({"steps": 6, **(sampling or {})}),
    }
    return parse_params(tree).runs()[0]


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the library's sampler from those of the cases."""
    found = dict(options)
    if "variance" in found:
        found["variance"] = VARIANCES[found["variance"]]
    return found


def make_schedule(process: str, turning_points: Sequence[int] = (), **options: Any) -> Schedule:
    """A schedule; options are base, shift, attenuation, floor, timesteps."""
    make = getattr(Schedule, process)
    return make(**options) if process == "ddpm" else make(tuple(turning_points), **options)


def schedule_tables(schedule: Schedule) -> Tensor:
    return torch.stack([schedule.signal, schedule.noise])


def make_process(schedule: Schedule) -> Process:
    return Process(schedule)


def make_network(run: Run, levels: int) -> nn.Module:
    return build_network(run.model, levels)


def make_denoiser(network: nn.Module, process: Process, prediction: str) -> Callable[..., Tensor]:
    return NetworkDenoiser(network, process, SIZE, PREDICTIONS[prediction])  # type: ignore[arg-type]


def training_example(
    process: Process, prediction: str, level: int, t: Tensor, clean: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    return example(process, PREDICTIONS[prediction], level, t, clean, noise)  # type: ignore[arg-type]


def posterior(process: Process, t: Tensor, s: Tensor, level: int, variance: str) -> Tensor:
    return torch.stack(process.posterior(t, s, level, VARIANCES[variance]))  # type: ignore[arg-type]


def ddim_step(process: Process, t: Tensor, s: Tensor, level: int, eta: float) -> Tensor:
    return torch.stack(process.ddim(t, s, level, eta))


def lift(process: Process, x: Tensor, level: int, noise: Tensor, data_std: float) -> Tensor:
    return Process(process.schedule, [data_std] * (process.levels + 1)).lift(x, level, noise)


def draw(process: Process, denoiser: Callable[..., Tensor], count: int, **options: Any) -> Tensor:
    """Samples; options are steps, solver, eta, variance, clip, timestep_spacing, share, lift_std, labels, start, ..."""
    process = Process(process.schedule, options.pop("lift_std", None))
    return sample(process, denoiser, (count, 3, SIZE, SIZE), **_sampling(options))


def timesteps(schedule: Schedule, steps: int, timestep_spacing: str, share: Any) -> list[tuple[int, list[int]]]:
    return step_grid(schedule, steps, timestep_spacing, share)


def make_images(pixels: np.ndarray, labels: np.ndarray | None = None) -> ArrayImages:
    return ArrayImages(pixels, labels)


def train_run(run: Run, images: ArrayImages, folder: Path) -> None:
    told = {"label_counts": [8, 9, 7, 6], "band_std": [*DATA_STD[: len(run.turning_points)], 0.7]}
    train(run, images, folder, "recorded", description=told)


def ema_weights(folder: Path) -> Tensor:
    """All weights of a finished run as one row, in the order in which the network is built: names do not matter."""
    network = load_model(folder / "weights.safetensors").denoiser.network
    return torch.cat([tensor.flatten() for tensor in network.state_dict().values()])


def logged(folder: Path) -> Tensor:
    """Images seen (over 40), losses (of each level, then of all), norms of gradients and learning rates."""
    rows = []
    for entry in ledger.read(folder / "metrics.jsonl"):
        levels = [entry.metrics.get(f"loss/level_{level}", -1.0) for level in range(3)]
        rows.append(
            [entry.images / 40, *levels, *(entry.metrics[n] for n in ("loss", "gradient_norm", "learning_rate"))]
        )
    return torch.tensor(rows, dtype=torch.float64)


def model_samples(folder: Path, count: int, **options: Any) -> Tensor:
    return load_model(folder / "weights.safetensors").sample(count, **_sampling(options))


def generated_std(schedule: Schedule, std: Sequence[float], steps: int, **options: Any) -> list[float]:
    options["lift"] = "data" if options.pop("lift_std") else "noise"
    return planning.generated_std(schedule, std, steps, **_sampling(options))


def plans(run: Run, data_std: Sequence[float], sets: Sequence[Sequence[int]]) -> list[float]:
    planner = Planner(run, data_std, sorted({point for points in sets for point in points}))
    return [number for points in sets for number in _plan_numbers(planner.plan(points))]


def best_plans(run: Run, data_std: Sequence[float]) -> list[float]:
    """The frontier of all sets of up to two candidates, with costs that are given."""
    points = candidate_points(1000)[::3]
    planner = Planner(run, data_std, points, costs=[1.0, 0.3, 0.1])
    return [number for plan in frontier(search(planner, 2, points)) for number in _plan_numbers(plan)]


def _plan_numbers(plan: Any) -> list[float]:
    several = (plan.turning_points, plan.shares, plan.nfe, plan.band_errors, plan.lift_losses)
    one = [plan.error, plan.excess, plan.training_speedup, plan.sampling_speedup]
    return [*(float(number) for numbers in several for number in numbers), *one]


def nats_lost(schedule: Schedule, data_std: Sequence[float]) -> list[float]:
    return lift_losses(schedule, data_std, SIZE)


def fisher(process: Process, denoiser: Callable[..., Tensor], images: Tensor) -> list[list[float | None]]:
    from dvdp.planning.fisher import orthogonal_divergences

    return orthogonal_divergences(process, denoiser, images, [50, 250, 700], 2)


def costs(run: Run) -> list[float]:
    return [mean_flops(run), relative_flops(run), training_images(run)]


def images_of_levels(schedule: Schedule, levels: str, step: int) -> list[int]:
    return level_counts(schedule, levels, 3, step, images=11)  # type: ignore[arg-type]


def image_noise(seed: int, first: int, count: int, shape: Sequence[int]) -> Tensor:
    return ImageNoise(seed, first, count).normal(shape)


def drawn_labels(counts: Sequence[int], count: int) -> Tensor:
    return Classes(counts).draw(4, 2, count)


def seed_of(*purpose: int | str) -> int:
    return derive_seed(*purpose)


def band_energies(x: Tensor, levels: int) -> Tensor:
    return bands.energies(x, levels)


def scaled_bands(x: Tensor, factors: Tensor) -> Tensor:
    return bands.scale(x, factors)


def data_std_of(pixels: np.ndarray) -> list[float]:
    moments = Moments.of(list(pixels), SIZE)
    return [*moments.means(), *(number for numbers in moments.std() for number in numbers)]


def fidelity(generated: Tensor, real: Tensor) -> list[float]:
    from dvdp.evaluation.coverage import precision_recall
    from dvdp.evaluation.extrapolation import extrapolate
    from dvdp.evaluation.fidelity import frechet

    distances = {count: frechet(generated[:count], real) for count in (80, 120, 160, 200)}
    return [*distances.values(), *extrapolate(distances), *precision_recall(generated, real)]


def score_samples(real: ArrayImages, samples: np.ndarray, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """All metrics of a tiny extractor that is trained for it, with the error; and what as many real images score."""
    from dvdp.evaluation.extractors import load_extractor, train_extractor
    from dvdp.evaluation.reference import anchors, make_reference
    from dvdp.evaluation.scores import score

    train_extractor(real, "labels", 2, "recorded", folder / "extractor")
    extractor = load_extractor(folder / "extractor")
    make_reference(real, "recorded", extractor, folder / "reference")
    (folder / "samples").mkdir()
    np.save(folder / "samples" / "00000000.npy", samples)
    record = score(folder / "samples", folder / "reference", extractor, kid_subset=50)
    real_ones = {
        f"{title} {name}": value
        for title, anchor in anchors(folder / "reference", 150, 50).items()
        for name, value in [*anchor.metrics.items(), *((f"{name}_spread", v) for name, v in anchor.spreads.items())]
    }
    return record.metrics, real_ones


def audited(process: Process, denoiser: Callable[..., Tensor], images: ArrayImages) -> list[float]:
    """Costs of all parts, scores and states of an audit, whose score is a mean and a deviation."""
    from dvdp.audit.run import audit

    def score(samples: Any) -> float:
        pixels = torch.stack([samples[i] for i in range(len(samples))]).double()
        return pixels.mean().item() / 100 + pixels.std().item() / 10

    how = _sampling({"solver": "dpm++2m", "steps": 6, "timestep_spacing": "logsnr", "seed": 3})
    found = audit(process, denoiser, images, score, 64, how, solver_steps=9)
    parts = found.attribution
    numbers = [*parts.costs.values(), parts.total, parts.solver or 0.0, parts.error]
    for value in found.scores.values():
        numbers += [value.value, *value.halves]
    for state in found.states:
        numbers += [*state.generated, *state.true, *state.errors, state.mean_difference, state.mean_floor]
        numbers += [state.distance, state.distance_floor]
    return numbers


# ---- The cases. ------------------------------------------------------------------------------------------------------
FILE = Path(__file__).parent / "recorded_numbers.json"
SIZE = 16
DATA_STD = (0.15, 0.3, 0.6)
PROCESSES: dict[str, tuple[int, ...]] = {"ddpm": (), "dvdp": (300, 600), "subspace": (400,)}
SOLVERS: dict[str, dict[str, Any]] = {
    "ddpm small": {"solver": "ddpm", "variance": "small"},
    "ddpm large": {"solver": "ddpm", "variance": "large"},
    "ddim": {"solver": "ddim"},
    "ddim eta 0.5": {"solver": "ddim", "eta": 0.5},
    "dpm++2m": {"solver": "dpm++2m"},
    "sde-dpm++2m": {"solver": "sde-dpm++2m"},
    "deis2": {"solver": "deis2"},
    "deis3": {"solver": "deis3"},
}
Cases = dict[str, Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random images with something at every level, uint8 (count, 3, 16, 16), and their labels, 0 to 2 or -1."""
    source = np.random.default_rng(seed)
    labels = source.integers(-1, 3, count)
    pixels = source.integers(0, 120, (count, 3, SIZE, SIZE))
    pixels += source.integers(0, 60, (count, 3, 4, 4)).repeat(4, 2).repeat(4, 3)
    pixels[:, 0, 4:9] += 25 * labels[:, None, None]
    return pixels.clip(0, 255).astype(np.uint8), labels


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def schedules() -> Cases:
    """Tables, with every base and attenuation, and what follows from them alone."""
    cases = {f"schedule {name}": schedule_tables(make_schedule(name, points)) for name, points in PROCESSES.items()}
    for attenuation in ("cosine", "squared_cosine", "circular", "linear"):
        options = {"attenuation": attenuation, "floor": 0.2, "base": "cosine", "shift": -0.7, "timesteps": 200}
        cases[f"schedule {attenuation}"] = schedule_tables(make_schedule("dvdp", (60, 120), **options))
    for name, points in PROCESSES.items():
        shares: list[Any] = ["length", "cost", [10, *[3] * len(points)]]
        cases[f"timesteps {name}"] = numbers(
            [
                number
                for spacing in ("uniform", "quadratic", "logsnr")
                for share in shares
                for level, times in timesteps(make_schedule(name, points), 10 + 3 * len(points), spacing, share)
                for number in (level, *times)
            ]
        )
        draws = [images_of_levels(make_schedule(name, points), d, s) for d in ("all", "one") for s in range(12)]
        cases[f"images of levels {name}"] = numbers(draws)
    cases["image noise"] = image_noise(5, 7, 3, (3, 8, 8))
    cases["labels"] = numbers(drawn_labels([3, 5, 4, 2], 40).tolist())
    cases["seeds"] = numbers([seed_of(3, "weights"), seed_of(0, "image", 17), seed_of("x", 2**40)]) / 2**63
    cases["band energies"] = band_energies(random(3, 3, SIZE, SIZE), 3)
    cases["scaled bands"] = scaled_bands(random(3, 3, SIZE, SIZE), random(3, 4, seed=1))
    cases["data"] = numbers(data_std_of(pictures(40)[0]))
    return cases


def process_steps(name: str) -> Cases:
    """Forward and reverse equations of each level."""
    process = make_process(make_schedule(name, PROCESSES[name]))
    clean, cases = random(4, 3, SIZE, SIZE) / 2, {}
    bounds = (0, *PROCESSES[name], 1000)
    for level, (low, high) in enumerate(pairwise(bounds)):
        t = torch.tensor([low + 1, low + 37, (low + high) // 2, high])
        side = SIZE >> level
        noise = random(4, 3, side, side, seed=level)
        x = process.diffuse(clean, t, noise)
        predicted = process.predict_clean(x, t, noise / 2)
        found = [x, predicted, process.predict_noise(x, t, predicted)]
        for prediction in PREDICTIONS:
            found += training_example(process, prediction, level, t, clean, noise)
        cases[f"states {name} {level}"] = torch.stack(found)
        t, s = torch.tensor([high, high - 20, low + 5]), torch.tensor([high - 20, low + 5, low])
        steps = [posterior(process, t, s, level, variance) for variance in VARIANCES]
        cases[f"steps {name} {level}"] = torch.stack([*steps, *(ddim_step(process, t, s, level, e) for e in (0, 0.5))])
        if level:
            wide = random(4, 3, 2 * side, 2 * side, seed=9)
            cases[f"lifts {name} {level}"] = torch.stack([lift(process, x, level, wide, std) for std in (0.0, 0.4)])
    return cases


def linear(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """A denoiser without a network: every sum in it has two terms, which all machines add alike."""
    return 0.75 * x + 0.125 * x.flip(-1)


def network_denoiser(process: Process, run: Run, prediction: str, levels: int) -> Callable[..., Tensor]:
    """One with random weights everywhere: a fresh network has zeros in its last layers."""
    network = make_network(run, levels)
    source = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in network.parameters():
            inputs = max(1, weight[0].numel()) if weight.ndim > 1 else 25
            base = 1.0 if weight.ndim == 1 and float(weight.mean()) == 1.0 else 0.0
            weight.copy_(base + torch.randn(weight.shape, generator=source) / math.sqrt(inputs))
    return make_denoiser(network.eval(), process, prediction)


def solver_samples(name: str) -> Cases:
    """Every solver on a process, with a network that predicts v."""
    process, cases = make_process(make_schedule(name, PROCESSES[name])), {}
    denoiser = network_denoiser(process, make_run(name, PROCESSES[name]), "v", len(PROCESSES[name]))
    for solver, options in SOLVERS.items():
        cases[f"samples {name} {solver}"] = draw(process, denoiser, 2, steps=8, seed=1, first=3, **options)
    return cases


def network_samples() -> Cases:
    """What the network may predict, classes, a network for each level, a start in between."""
    cases = {}
    for name, points in PROCESSES.items():
        process = make_process(make_schedule(name, points))
        for prediction in PREDICTIONS:
            denoiser = network_denoiser(process, make_run(name, points, prediction), prediction, len(points))
            cases[f"samples {name} predicting {prediction}"] = draw(
                process, denoiser, 2, steps=6, solver="ddim", seed=2
            )
    points = PROCESSES["dvdp"]
    process = make_process(make_schedule("dvdp", points))
    denoiser = network_denoiser(process, make_run("dvdp", points, classes=3, networks="per_level"), "v", len(points))
    labels = torch.tensor([0, 2, -1])
    cases["samples with labels"] = draw(process, denoiser, 3, steps=6, labels=labels, lift_std=DATA_STD)
    start = (random(3, 3, 4, 4, seed=5), 600)
    cases["samples from a start"] = draw(process, denoiser, 3, steps=9, labels=labels, start=start)
    return cases


def plain_samples() -> Cases:
    """Solvers, spacings, shares, lifts and clipping without a network, in float32 and float64."""
    cases = {}
    for name, points in PROCESSES.items():
        process = make_process(make_schedule(name, points))
        options = {"timestep_spacing": "logsnr", "share": "cost", "clip": False, "dtype": torch.float64}
        found = [draw(process, linear, 1, steps=12, **options, **solver) for solver in SOLVERS.values()]
        cases[f"plain samples {name}"] = torch.cat(found)
        for spacing in ("uniform", "quadratic", "logsnr"):
            ways = product(("length", "cost"), (True, False), (True, False))
            cases[f"plain samples {name} {spacing}"] = torch.cat(
                [
                    draw(
                        process,
                        linear,
                        1,
                        steps=7,
                        solver="ddpm" if clip else "dpm++2m",
                        timestep_spacing=spacing,
                        share=share,
                        clip=clip,
                        lift_std=DATA_STD[: len(points) + 1] if lifted else None,
                    )
                    for share, clip, lifted in ways
                ]
            )
    process = make_process(make_schedule("dvdp", PROCESSES["dvdp"]))
    cases["plain samples dvdp given calls"] = draw(process, linear, 2, steps=9, share=[2, 3, 4], solver="deis3")
    return cases


RUNS: dict[str, dict[str, Any]] = {
    **{
        f"{name} {prediction}": {"process": name, "turning_points": points, "prediction": prediction}
        for name, points in PROCESSES.items()
        for prediction in PREDICTIONS
    },
    "muon one accumulation": {
        "process": "dvdp",
        "turning_points": (300, 600),
        "optimizer": "muon",
        "levels": "one",
        "accumulation": 2,
        "classes": 3,
        "weight_decay": 0.01,
        "cooldown": 0.5,
    },
    "per level checkpointing": {
        "process": "subspace",
        "turning_points": (400,),
        "networks": "per_level",
        "checkpointing": True,
        "dropout": 0.1,
        "prediction": "epsilon",
        "ema_halflife_images": 10,
        "ema_ramp": 1.0,
    },
}
#: In bf16.
SHORT_RUNS: dict[str, dict[str, Any]] = {
    f"bf16 {optimizer} {levels}": {
        "process": "dvdp",
        "turning_points": (300, 600),
        "optimizer": optimizer,
        "levels": levels,
        "accumulation": 2,
        "classes": 3,
        "precision": "bf16",
        "sampling": {"solver": "sde-dpm++2m", "lift": "data", "steps": 6},
    }
    for optimizer, levels in (("muon", "all"), ("adamw", "one"))
}
RESUMED: dict[str, Any] = {**RUNS["dvdp v"], "dropout": 0.1, "optimizer": "muon", "images": 32}


def training_images_of(options: Mapping[str, Any]) -> ArrayImages:
    pixels, labels = pictures(30)
    return make_images(pixels, labels if options.get("classes") else None)


def trained(name: str, options: Mapping[str, Any]) -> Cases:
    with tempfile.TemporaryDirectory() as folder:
        train_run(make_run(**options), training_images_of(options), Path(folder))
        cases = {f"weights {name}": ema_weights(Path(folder)), f"losses {name}": logged(Path(folder))}
        if "sampling" in options:
            cases[f"pixels {name}"] = model_samples(Path(folder), 3, seed=4)
    return cases


def several(runs: Mapping[str, Mapping[str, Any]]) -> Cases:
    return {name: tensor for run, options in runs.items() for name, tensor in trained(run, options).items()}


def stopped_and_resumed() -> Cases:
    """A run that was stopped after a checkpoint and a log goes on to the bits of one that was not."""

    with tempfile.TemporaryDirectory() as folder:
        train_run(make_run(**RESUMED), training_images_of(RESUMED), Path(folder) / "whole")
        with pytest.raises(InterruptedHere), stop_after(32):
            train_run(make_run(**RESUMED), training_images_of(RESUMED), Path(folder) / "stopped")
        train_run(make_run(**RESUMED), training_images_of(RESUMED), Path(folder) / "stopped")
        whole, stopped = ((ema_weights(p), logged(p)) for p in (Path(folder) / "whole", Path(folder) / "stopped"))
    assert torch.equal(whole[0], stopped[0]), "the stopped run has other weights than the undisturbed one"
    assert torch.equal(whole[1], stopped[1]), "the stopped run has logged something else than the undisturbed one"
    return {"weights resumed": stopped[0], "losses resumed": stopped[1]}


def rank(number: int, folder: str) -> None:
    with one_thread():
        meet = f"file://{folder}.meet"
        dist.init_process_group("gloo", init_method=meet, rank=number, world_size=2, timeout=timedelta(seconds=120))
        try:
            options = {**RUNS["dvdp v"], "accumulation": 2, "groups": 2}
            train_run(make_run(**options), training_images_of(options), Path(folder))
        finally:
            dist.destroy_process_group()


def two_ranks() -> Cases:
    """This process is rank 0, and starts the other."""
    with tempfile.TemporaryDirectory() as folder:
        # A fork imports nothing again, which takes longer than the rest; a process that uses a GPU must not be forked.
        other = mp.get_context("spawn" if torch.cuda.is_available() else "fork").Process(
            target=rank, args=(1, f"{folder}/run")
        )
        other.start()
        try:
            rank(0, f"{folder}/run")
        finally:
            other.join(60)
            if other.is_alive():
                other.kill()
        assert other.exitcode == 0, f"the other rank ended with {other.exitcode}"
        path = Path(folder) / "run"
        return {"weights two ranks": ema_weights(path), "losses two ranks": logged(path)}


def planner_numbers() -> Cases:
    """What is expected of turning points, and what runs cost."""
    cases = {}
    for name, points in PROCESSES.items():
        schedule, std = make_schedule(name, points), DATA_STD[: len(points) + 1]
        found = [
            generated_std(schedule, std, 15, timestep_spacing=spacing, share=share, lift_std=lifted, **solver)
            for solver in SOLVERS.values()
            for spacing, share, lifted in (("uniform", "length", None), ("logsnr", "cost", std))
        ]
        cases[f"generated std {name}"] = numbers(found)
    cases["nats lost"] = numbers(nats_lost(make_schedule("dvdp", (300, 600)), DATA_STD))
    run = make_run("dvdp", (300,), sampling={"solver": "deis2", "steps": 20})
    cases["plans dvdp"] = numbers(plans(run, DATA_STD, [(), (300,), (600,), (300, 600), (250, 500)]))
    run = make_run("subspace", (300,), sampling={"steps": 20, "lift": "data", "timestep_spacing": "quadratic"})
    cases["plans subspace"] = numbers(plans(run, DATA_STD, [(), (300,), (200, 600)]))
    cases["frontier"] = numbers(best_plans(run, DATA_STD))
    options = {"budget": "flops", "images": 4000}
    cases["costs"] = numbers([costs(make_run(name, points, **options)) for name, points in PROCESSES.items()])
    process = make_process(make_schedule("dvdp", (600,)))
    found = fisher(process, linear, random(4, 3, SIZE, SIZE) / 2)
    cases["fisher"] = numbers([-1.0 if number is None else number for row in found for number in row])
    return cases


def scores() -> Cases:
    """Distances of fixed features, and all metrics of a tiny extractor."""
    real, generated = random(240, 12, dtype=torch.float64), random(200, 12, seed=1, dtype=torch.float64) * 1.1 + 0.2
    cases = {"fidelity": numbers(fidelity(generated, real))}
    pixels, labels = pictures(200)
    with tempfile.TemporaryDirectory() as folder:
        samples = (pictures(150, seed=1)[0] * 0.9 + 12).astype(np.uint8)
        metrics, anchors = score_samples(make_images(pixels, labels.clip(min=0)), samples, Path(folder))
    cases["error of the score"] = numbers([metrics.pop("fd_labels_error")])
    # Newer than the record.
    for name in ("copies", "precision_labels_error", "recall_labels_error", "kd_labels_error"):
        del metrics[name]
    return {**cases, "score": numbers(list(metrics.values())), "anchors": numbers(list(anchors.values()))}


def audit_numbers() -> Cases:
    process = make_process(make_schedule("dvdp", (300,)))
    return {"audit": numbers(audited(process, linear, make_images(pictures(80)[0])))}


#: Of a group: its cases, and how far their statistics may be off on another machine, in units of the tensor's size.
#: With AVX2 in place of AVX-512 they were off by: 1e-14 where float64 or sums of few terms are rounded; 4e-6 where a
#: float32 network of some 20 layers is called 8 times, as other kernels add in another order; 4e-5 where it predicts
#: the noise, which is divided by a small signal; 5e-6 in weights trained with AdamW; 2e-3 in those trained with Muon,
#: which makes its matrices orthogonal in bf16; 1e-2 where the network itself is bf16.
GROUPS: dict[str, tuple[Callable[[], Cases], float]] = {
    "schedules": (schedules, 1e-6),
    **{f"process {name}": (partial(process_steps, name), 1e-6) for name in PROCESSES},
    "plain samples": (plain_samples, 1e-6),
    **{f"solvers {name}": (partial(solver_samples, name), 1e-4) for name in PROCESSES},
    "network samples": (network_samples, 3e-4),
    **{
        f"training {name}": (partial(trained, name, options), 2e-2 if options.get("optimizer") == "muon" else 1e-4)
        for name, options in RUNS.items()
    },
    "training bf16": (partial(several, SHORT_RUNS), 5e-2),
    "stopped and resumed": (stopped_and_resumed, 2e-2),
    "two ranks": (two_ranks, 1e-4),
    "planner": (planner_numbers, 1e-6),
    "scores": (scores, 1e-4),
    "audit": (audit_numbers, 1e-5),
}
#: On the machine of the recording, of a case that need not have its bits: rounding of float32, if sums are reordered.
SAME_MACHINE = 1e-6


# ---- The record and the comparison. ----------------------------------------------------------------------------------
def machine() -> dict[str, str]:
    """What the bits depend on: the release of torch, and the processor with what it can do."""
    found: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    flags = hashlib.sha256(" ".join(sorted(found.get("flags", "").split())).encode()).hexdigest()[:12]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": found.get("model name", "unknown"),
        "flags": flags,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums over threads depend on their number; numpy and scikit-learn have their own."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def record(tensor: Tensor) -> dict[str, Any]:
    """A digest of the bytes, and statistics."""
    flat = tensor.detach().contiguous().flatten()
    values = flat.double()
    places = torch.linspace(0, len(flat) - 1, 8).round().long()
    return {
        "sha256": hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest(),
        "shape": list(tensor.shape),
        "sum": repr(math.fsum(values.tolist())),
        "squares": repr(math.fsum(values.square().tolist())),
        "entries": [repr(value) for value in values[places].tolist()],
    }


def greatest_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """Of two records' statistics, in units of the tensor's size (the root of its mean square)."""
    count = max(1, math.prod(wanted["shape"]))
    square = float(wanted["squares"]) / count
    size = math.sqrt(square) or 1.0
    off = [abs(float(a) - float(b)) / size for a, b in zip(found["entries"], wanted["entries"], strict=True)]
    off.append(abs(float(found["sum"]) - float(wanted["sum"])) / count / size)
    off.append(abs(float(found["squares"]) - float(wanted["squares"])) / count / (2 * (square or 1.0)))
    return math.inf if any(math.isnan(number) for number in off) else max(off)


def complaints(cases: Cases, recorded: Mapping[str, Any], tolerance: float, same_machine: bool) -> list[str]:
    """One sentence for each case that is not as it was."""
    said = []
    for name, tensor in cases.items():
        found, wanted = record(tensor), recorded[name]
        if found["shape"] != wanted["shape"]:
            said.append(f"{name}: found shape {found['shape']}, expected {wanted['shape']}.")
            continue
        off, equal = greatest_difference(found, wanted), found["sha256"] == wanted["sha256"]
        if same_machine and wanted["exact"] and not equal:
            said.append(
                f"{name}: found other bits than recorded on this machine; the statistics differ by up to {off:.2g} of"
                ' the size of the tensor; set "exact" to false to accept it if that is rounding.'
            )
        elif not equal and not off <= (allowed := wanted.get("within", SAME_MACHINE) if same_machine else tolerance):
            said.append(f"{name}: found statistics that differ by up to {off:.2g}, expected at most {allowed:g}.")
    return said


@pytest.mark.parametrize("group", GROUPS)
def test_numbers_are_those_recorded(group: str) -> None:
    file = json.loads(FILE.read_text())
    make, tolerance = GROUPS[group]
    with one_thread():
        cases = make()
    recorded = file["groups"][group]
    assert list(cases) == list(recorded), "the cases are not those of the file; write it again"
    assert not (said := complaints(cases, recorded, tolerance, file["machine"] == machine())), "\n".join(said)


def test_the_record_holds_the_groups_of_this_file() -> None:
    assert list(json.loads(FILE.read_text())["groups"]) == list(GROUPS)


def compute() -> dict[str, Cases]:
    with one_thread():
        return {group: make() for group, (make, _) in GROUPS.items()}


def _kept(case: Mapping[str, Any]) -> dict[str, Any]:
    """What a case demands, which recording it again does not change."""
    return {"exact": case.get("exact", True), **({"within": case["within"]} if "within" in case else {})}


def write() -> None:
    """Write the file again; a case keeps what it demands."""
    before = json.loads(FILE.read_text())["groups"] if FILE.is_file() else {}
    groups = {
        group: {
            name: {**_kept(before.get(group, {}).get(name, {})), **record(tensor)} for name, tensor in cases.items()
        }
        for group, cases in compute().items()
    }
    # A line for each case, so that a difference between two versions of the file can be read.
    parts = [
        f" {json.dumps(group)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in cases.items())
        + "\n }"
        for group, cases in groups.items()
    ]
    FILE.write_text(f'{{"machine": {json.dumps(machine())},\n"groups": {{\n' + ",\n".join(parts) + "\n}}\n")


def dump(path: Path) -> None:
    """Keep every number."""
    flat = {f"{group}/{name}": tensor.numpy() for group, c in compute().items() for name, tensor in c.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **flat)  # type: ignore[arg-type]


def against(path: Path) -> None:
    """Print the greatest difference of each case from a dump, over the tensor's size; of equal ones their number."""
    equal = 0
    with np.load(path) as kept:
        for group, cases in compute().items():
            for name, tensor in cases.items():
                a, b = kept[f"{group}/{name}"].astype(np.float64), tensor.double().numpy()
                if a.shape != b.shape or not np.array_equal(a, b):
                    off = (
                        np.abs(a - b).max() / (np.sqrt(np.square(a).mean()) or 1.0) if a.shape == b.shape else math.inf
                    )
                    print(f"{group}: {name}: {off:.3g}")
                else:
                    equal += 1
    print(f"{equal} cases are equal to the bit.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--dump", type=Path)
    what.add_argument("--against", type=Path)
    options = parser.parse_args()
    if options.write:
        write()
    elif options.dump:
        dump(options.dump)
    else:
        against(options.against)


if __name__ == "__main__":
    main()
