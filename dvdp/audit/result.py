"""Which level, which lift, or the solver costs the score.

Sampling is a chain: level K from noise, the lift at T_K, level K - 1, .., the lift at T_1, level 0. A start from true
diffused states in place of generated ones mends all of the chain before it. So a link costs what the score gains
between a start just after it and one just before it, and the links add up to what samples lose against real images.

Starts are named ``free`` (from noise), ``before_k`` and ``after_k`` (true states at T_k, before the lift and as a
perfect lift would leave them) and ``real`` (no sampling: the real images that the true states are made of).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dvdp.errors import UserError

#: Steps of the ancestral sampling that the solver is compared with, at least.
SOLVER_STEPS = 250
FREE, REAL, SOLVER = "free", "real", "solver"
_DEFAULTS = {"steps": 1000, "solver": "ddpm", "eta": 0.0, "timestep_spacing": "uniform", "share": "length"}


@dataclass(frozen=True)
class Score:
    """Of a number of images, lower is better."""

    value: float
    halves: tuple[float, float]
    """Of the first and the second half of the images: their differences tell the sampling error."""


@dataclass(frozen=True)
class StateComparison:
    """Generated states at a turning point, just before the lift, beside as many true ones."""

    turning_point: int
    """T_k, a timestep."""
    level: int
    """k, the level that is left."""
    generated: tuple[float, ...]
    """Root mean square of each band, k .. K, per coefficient."""
    true: tuple[float, ...]
    errors: tuple[float, ...]
    """One standard error of generated / true of each band."""
    mean_difference: float
    """Between the means of generated and true averages, in the true ones' std, root mean square over them."""
    mean_floor: float
    """The same between two halves of the true states."""
    distance: float
    """Frechet, between the features of generated and true states, in the true ones' std."""
    distance_floor: float
    """The same between two halves of the true states."""


@dataclass(frozen=True)
class Attribution:
    """What each part of sampling costs, in units of the score."""

    costs: dict[str, float]
    """Of ``level_K``, ``lift_K``, .., ``lift_1``, ``level_0``, in sampling order; they sum to ``total``."""
    total: float
    """Score of free-running samples less that of as many real images."""
    solver: float | None
    """The part of ``total`` that many ancestral steps would not lose, wherever; None if the solver is that one."""
    error: float
    """One standard error of a cost, pooled over all of them; from the two halves of the images."""


@dataclass(frozen=True)
class Audit:
    """The result for one model."""

    metric: str
    images: int
    """Behind every score, and states behind every comparison."""
    resolution: int
    """Of the images, in pixels."""
    timesteps: int
    turning_points: tuple[int, ...]
    sampling: dict[str, Any]
    solver: dict[str, Any] | None
    """The sampling that the solver is compared with; None if it is the model's own."""
    scores: dict[str, Score]
    """Of every start of :func:`starts`, ``real``, and ``solver``: free-running with that sampling."""
    states: tuple[StateComparison, ...]
    """At T_1, .., T_K."""
    notes: dict[str, str] = field(default_factory=dict)
    """Whatever leads back to the model, the data and the extractor."""

    @property
    def attribution(self) -> Attribution:
        """See :func:`attribute`."""
        return attribute(self.scores, len(self.turning_points))

    @property
    def worst(self) -> str | None:
        """The level or lift that costs most, or ``solver`` if that costs more than all else; None if none stands out.

        To stand out is to cost more than three standard errors.
        """
        found = self.attribution
        part = max(found.costs, key=found.costs.__getitem__)
        if found.solver is not None and found.solver > max(found.total - found.solver, 3 * found.error):
            return SOLVER
        return part if found.costs[part] > 3 * found.error else None

    @property
    def verdict(self) -> str:
        """One sentence: what costs most."""
        found, part = self.attribution, self.worst
        error = f"± {found.error:.2g}"
        lost = f"of the {found.total:.3g} {self.metric} that samples lose against real images"
        if part is None:
            return (
                f"no part costs {self.metric} beyond the sampling error, {error} each; all together cost"
                f" {found.total:.2g}."
            )
        if part == SOLVER:
            costs = {name: cost for name, cost in found.costs.items() if self.turning_points}
            most = max(costs, key=costs.__getitem__, default=None)
            where = "" if most is None else f"; among levels and lifts {self.title(most)} costs most, {costs[most]:.3g}"
            return f"the solver costs most, {found.solver:.3g} {error} {lost}{where}."
        what = f"{self.title(part)} costs most" if self.turning_points else "there is one level, which costs all"
        said = f"{what}, {found.costs[part]:.3g} {error} {lost}"
        close = [
            f"{self.title(name)} ({cost:.3g})"
            for name, cost in found.costs.items()
            if name != part and found.costs[part] - cost <= 2 * math.sqrt(2) * found.error
        ]
        if close:
            said += f", not told apart from {' and '.join(close)}"
        if found.solver is None:
            return f"{said}."
        share = f"{found.solver:.3g} of all" if found.solver > 2 * found.error else "none that could be told"
        return f"{said}; the solver accounts for {share}."

    def title(self, part: str) -> str:
        """A part for people: ``level 1 (t = 600 to 300, 16 px)``, ``the lift at t = 300``, ``the solver``."""
        if part == SOLVER:
            return "the solver"
        kind, _, number = part.partition("_")
        if kind == "lift":
            return f"the lift at t = {self.turning_points[int(number) - 1]}"
        bounds = (0, *self.turning_points, self.timesteps)
        level = int(number)
        return f"level {level} (t = {bounds[level + 1]} to {bounds[level]}, {self.resolution >> level} px)"

    def to_json(self) -> str:
        """As text; :meth:`from_json` gives back an equal one."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "audit") -> Audit:
        """From its text.

        Args:
            source: names the text in errors, e.g. its path.

        Raises:
            UserError: the text is no audit.
        """
        try:
            tree = json.loads(text)
            scores = {name: Score(entry["value"], tuple(entry["halves"])) for name, entry in tree["scores"].items()}
            states = tuple(StateComparison(**_with_tuples(entry)) for entry in tree["states"])
            known = {**tree, "turning_points": tuple(tree["turning_points"]), "scores": scores, "states": states}
            return Audit(**known)
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{source}: found something else than an audit, expected the JSON that `dvdp audit` writes; delete it"
                " and audit again."
            ) from None


def starts(levels: int) -> list[str]:
    """Where sampling starts, in the order of sampling: ``free``, ``before_K``, ``after_K``, .., ``after_1``."""
    return [FREE, *(f"{when}_{k}" for k in range(levels, 0, -1) for when in ("before", "after"))]


def attribute(scores: Mapping[str, Score], levels: int) -> Attribution:
    """What each level, each lift and the solver cost.

    With S the score of a start: level K costs S(free) - S(before_K), the lift at T_k costs S(before_k) - S(after_k),
    level k costs S(after_{k+1}) - S(before_k), and level 0 costs S(after_1) - S(real). Beside them, not added to
    them, the solver costs S(free) - S(solver).

    Args:
        scores: of every start, ``real``, and ``solver`` if there is one.
        levels: K.
    """
    links = list(pairwise([*starts(levels), REAL]))
    parts = [f"level_{levels}", *(part for k in range(levels, 0, -1) for part in (f"lift_{k}", f"level_{k - 1}"))]
    solver = [(FREE, SOLVER)] if SOLVER in scores else []
    # Half the images have twice the variance, and there are two such halves: half their difference has the error.
    spreads = [
        ((scores[a].halves[0] - scores[b].halves[0]) - (scores[a].halves[1] - scores[b].halves[1])) / 2
        for a, b in [*links, *solver]
    ]
    return Attribution(
        costs={part: scores[a].value - scores[b].value for part, (a, b) in zip(parts, links, strict=True)},
        total=scores[FREE].value - scores[REAL].value,
        solver=scores[FREE].value - scores[SOLVER].value if solver else None,
        error=math.sqrt(sum(spread**2 for spread in spreads) / len(spreads)),
    )


def solver_sampling(sampling: Mapping[str, Any], timesteps: int, steps: int | None = None) -> dict[str, Any] | None:
    """The sampling that a solver is compared with: ancestral, many even steps; None if it is the given one.

    Args:
        steps: by default the given ones, and at least :data:`SOLVER_STEPS`, as far as there are timesteps.
    """
    own = {**_DEFAULTS, **sampling}
    steps = min(timesteps, max(own["steps"], SOLVER_STEPS)) if steps is None else steps
    many = {**own, **_DEFAULTS, "steps": steps}
    return None if many == own else many


def _with_tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
