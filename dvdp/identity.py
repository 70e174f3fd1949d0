"""What names a result: hashes over everything that shapes it, and nothing else."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dvdp.config import EvaluationParams, Run
from dvdp.models.flops import training_images

#: Sources whose change changes trained weights; see :func:`syntax_digest` for what counts as a change.
TRAINING_SOURCES = (
    "diffusion/spans.py", "diffusion/bands.py", "diffusion/schedule.py", "diffusion/process.py",
    "diffusion/randomness.py",
    "models/pixels.py", "models/ops.py", "models/norms.py", "models/norm_kernels.py",
    "models/unet.py", "models/denoiser.py", "models/compute.py", "models/compilation.py",
    "training/levels.py", "training/ranks.py", "training/optimizer.py", "training/ema.py", "training/fit.py",
    "training/start.py", "training/loop.py",
    "data/transforms.py", "data/loading.py",
)  # fmt: skip
SAMPLING_SOURCES = (
    "diffusion/philox.py", "diffusion/philox_cuda.py", "diffusion/timesteps.py", "diffusion/solvers.py",
    "diffusion/guidance.py", "diffusion/conditional.py", "diffusion/sampling.py",
    "models/classes.py", "models/export.py",
)  # fmt: skip
EVALUATION_SOURCES = (
    "evaluation/scores.py", "evaluation/reference.py", "evaluation/fidelity.py", "evaluation/coverage.py",
    "evaluation/extractors.py", "evaluation/extrapolation.py", "evaluation/published.py", "evaluation/intervals.py",
)  # fmt: skip
LIKELIHOOD_SOURCES = ("diffusion/philox.py", "evaluation/likelihood.py")
AUDIT_SOURCES = ("audit/result.py", "audit/states.py", "audit/run.py")

#: Keys of the training section that do not touch the weights.
OPERATIONAL = {
    "images", "budget", "checkpoint_images", "keep_checkpoints", "log_images", "preview_images", "preview_count",
    "preview_steps", "loader_workers", "activation_checkpointing",
    # What it holds counts, not where it lies.
    "start",
    # Its smaller parts round otherwise, no more than another device does.
    "batch_fit",
}  # fmt: skip


def training_identity(run: Run) -> dict[str, Any]:
    """All of a run that shapes its weights, as plain data."""
    training = {k: v for k, v in dataclasses.asdict(run.training).items() if k not in OPERATIONAL}
    if not run.at_all_timesteps:
        del training["span"]  # Levels at their own timesteps, as those of earlier releases.
    if not run.training.label_dropout:
        del training["label_dropout"]  # Runs of releases without it keep their names.
    return {
        "process": run.process,
        "turning_points": run.turning_points,
        "resolution": run.resolution,
        "schedule": dataclasses.asdict(run.schedule),
        "model": dataclasses.asdict(run.model),
        "training": {**training, "total_images": training_images(run)},
        "seed": run.seed,
        # Runs from random weights keep their names.
        **({"start": run.start.sha256} if run.start else {}),
    }


def training_hash(run: Run, dataset_digest: str, flip: bool) -> str:
    """Names the run: its folder, its checkpoints and its Ray run, and a tag of its MLflow run.

    Args:
        dataset_digest: of the LMDB's content.
        flip: whether images are mirrored at random.

    Raises:
        UserError: the run starts from weights that nobody has looked at yet.
    """
    run.check_start()
    data = {"dataset": dataset_digest, "flip": flip}
    return _digest({**trained_as(run), **data, "sources": _sources(TRAINING_SOURCES)})


def trained_as(run: Run) -> dict[str, Any]:
    """The identity without turning points that are chosen after training; of these, their number counts."""
    points = {"turning_points": len(run.turning_points)} if run.at_all_timesteps else {}
    return {**training_identity(run), **points}


def sampling_hash(run: Run, trained: str) -> str:
    """Names the samples of a training hash."""
    left_out = {"count", "batch"} | run.sampling.off
    sampling = {k: v for k, v in dataclasses.asdict(run.sampling).items() if k not in left_out}
    points = {"turning_points": run.turning_points} if run.at_all_timesteps else {}
    return _digest({"training": trained, **points, "sampling": sampling, "sources": _sources(SAMPLING_SOURCES)})


def evaluation_hash(evaluation: EvaluationParams, sampled: str, reference_digest: str) -> str:
    """Names the scores of a sampling hash against a reference."""
    # The likelihood is a result of its own.
    asked = {k: v for k, v in dataclasses.asdict(evaluation).items() if k != "likelihood"}
    return _digest(
        {
            "sampling": sampled,
            "evaluation": asked,
            "reference": reference_digest,
            "sources": _sources(EVALUATION_SOURCES),
        }
    )


def likelihood_hash(run: Run, trained: str, images: int, dataset_digest: str) -> str:
    """Names the bound on the likelihood of so many images of a data set, under a training hash."""
    sampling = {name: getattr(run.sampling, name) for name in ("variance", "clip", "lift")}
    content = {"training": trained, "sampling": sampling, "images": images, "dataset": dataset_digest}
    return _digest({**content, "sources": _sources(LIKELIHOOD_SOURCES)})


def audit_draws_hash(sampled: str) -> str:
    """Names what an audit draws in the manner of a sampling hash: images from every start, and states."""
    return _digest({"sampling": sampled, "sources": _sources(AUDIT_SOURCES)})


def audit_hash(drawn: str, images: int, solver: Mapping[str, Any] | None, reference_digest: str) -> str:
    """Names an audit: so many of those images against a reference, and the sampling the solver is compared with."""
    content = {"draws": drawn, "images": images, "solver": solver, "reference": reference_digest}
    return _digest({**content, "sources": _sources(EVALUATION_SOURCES)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


@lru_cache(maxsize=8)
def _sources(names: tuple[str, ...]) -> str:
    package = Path(__file__).parent
    return syntax_digest([(package / name).read_text() for name in names])


def syntax_digest(sources: Iterable[str]) -> str:
    """SHA-256 over the syntax trees of Python sources, without comments, docstrings and formatting.

    So a corrected word or a reformatted line changes no hash, and an operator, a number or a name does.
    """
    digest = hashlib.sha256()
    for source in sources:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                if isinstance(body, list):
                    # A docstring, also one below an attribute, is an expression that is nothing but a string.
                    body[:] = [part for part in body if not _is_docstring(part)]
        digest.update(ast.dump(tree).encode() + b"\0")
    return digest.hexdigest()


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
