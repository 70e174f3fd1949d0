"""Hashes of sources: what a reader alone sees changes none, what a machine sees changes them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import dvdp
from dvdp import identity
from dvdp.config import Run, parse_params
from dvdp.identity import syntax_digest

SOURCE = '''"""A module."""

LIMIT: int = 3
"""The most that there may be."""


def double(x: int) -> int:
    """Twice."""
    # Why.
    return 2 * x
'''
DIGEST = syntax_digest([SOURCE])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# Why.", "# For another reason."),
        ("    # Why.\n", ""),
        ('"""Twice."""', '"""Two times x."""'),
        ('    """Twice."""\n', ""),
        ('"""A module."""', '"""A module of one function."""'),
        ('"""The most that there may be."""\n', ""),
        ("2 * x", "(2 * x)"),
        ("(x: int)", "(\n    x: int,\n)"),
        ("2 * x", "2*x"),
    ],
)
def test_comments_docstrings_and_formatting_change_no_hash(old: str, new: str) -> None:
    changed = SOURCE.replace(old, new)
    assert changed != SOURCE
    assert syntax_digest([changed]) == DIGEST


@pytest.mark.parametrize(
    ("old", "new"),
    [("2 * x", "2 + x"), ("2 * x", "3 * x"), ("= 3", "= 4"), ("double", "twice"), ("x: int", "x: float")],
)
def test_operators_numbers_names_and_types_change_the_hash(old: str, new: str) -> None:
    assert syntax_digest([SOURCE.replace(old, new)]) != DIGEST


def test_the_same_code_in_other_files_is_another_hash() -> None:
    assert syntax_digest([SOURCE, ""]) != syntax_digest(["", SOURCE])


def test_every_source_that_a_hash_names_is_there_and_training_reaches_no_other_of_the_method() -> None:
    package = Path(dvdp.__file__).parent
    groups = (identity.TRAINING_SOURCES, identity.SAMPLING_SOURCES, identity.EVALUATION_SOURCES, identity.AUDIT_SOURCES)
    for name in (name for group in groups for name in group):
        ast.parse((package / name).read_text())
    named = {name for group in groups for name in group}
    assert {f"diffusion/{path.name}" for path in (package / "diffusion").glob("[a-z]*.py")} <= named


def test_guidance_that_is_off_is_in_no_hash_and_one_that_is_on_in_those_of_what_it_shapes() -> None:
    def run(training: dict[str, Any], sampling: dict[str, Any]) -> Run:
        settings = {"a": {"process": "dvdp", "turning_points": [600]}}
        training = {"precision": "fp32", **training}
        return parse_params({"settings": settings, "training": training, "sampling": sampling}).run("a", 0)

    def hashes(run: Run) -> tuple[str, str]:
        trained = identity.training_hash(run, "data", flip=False)
        return trained, identity.sampling_hash(run, trained)

    plain, dropped = run({}, {}), run({"label_dropout": 0.1}, {})
    assert "label_dropout" not in identity.training_identity(plain)["training"]
    assert hashes(plain) == hashes(run({"label_dropout": 0.0}, {"guidance_scale": [1, 1.0], "guidance_rescale": 0.7}))
    assert hashes(plain)[0] != hashes(dropped)[0]
    changes: list[dict[str, Any]] = [
        {}, {"guidance_scale": 2}, {"guidance_scale": [1, 2]}, {"guidance_scale": 2, "guidance_rescale": 0.7},
        {"thresholding": 0.995},
    ]  # fmt: skip
    found = [hashes(run({"label_dropout": 0.1}, change)) for change in changes]
    assert len({trained for trained, _ in found}) == 1
    assert len({sampled for _, sampled in found}) == len(changes)
    assert plain.sampling.options().keys() == {
        "steps", "solver", "eta", "variance", "clip", "timestep_spacing", "share", "seed",
    }  # fmt: skip
