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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from dvdp import bands
from dvdp.data.loading import Images
from dvdp.errors import UserError
from dvdp.pixels import to_float, to_uint8
from dvdp.process import Process
from dvdp.randomness import ImageNoise, derive_seed, image_labels
from dvdp.sampling import Denoiser, Progress, sample

#: Fewer images leave the covariance of the features, of at most some 30 numbers, without full rank in a half of them.
FEWEST = 64
#: Steps of the ancestral sampling that the solver is compared with, at least.
SOLVER_STEPS = 250
#: States and real images that are looked at at a time.
CHUNK = 64

FREE, REAL, SOLVER = "free", "real", "solver"

#: Orthonormal: white noise stays white. The sum of the colours, and what is left of them.
_COLOURS = [[3**-0.5] * 3, [2**-0.5, 0.0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]]
_DEFAULTS = {"steps": 1000, "rule": "ddpm", "eta": 0.0, "spacing": "uniform", "share": "length"}


@dataclass(frozen=True, eq=False)
class Subject:
    """What is audited: a denoiser in its process, the data set, and the way of sampling."""

    process: Process
    denoiser: Denoiser
    images: Images
    sampling: Mapping[str, Any]
    """Arguments of :func:`dvdp.sampling.sample`: steps, rule, seed, ..."""
    batch: int = 128
    device: torch.device | str = "cpu"
    label_counts: Sequence[int] | None = None
    """Of the data, for :func:`dvdp.randomness.image_labels`; None for a denoiser that is told no classes."""

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self.images[0][0].shape[-1]

    @property
    def seed(self) -> int:
        """Of the sampling; it also chooses the real images, and the noise in true states."""
        return self.sampling.get("seed", 0)


class States(NamedTuple):
    """What is kept of states of one level."""

    energies: Tensor
    """(n, bands) float64: mean square per coefficient of each band of the process, finest of the level first."""
    averages: Tensor
    """(n, at most 24) float64; see :func:`describe`."""
    sizes: Tensor
    """(n, f) float64, of the bands finer than the averages; see :func:`describe`."""

    @property
    def features(self) -> Tensor:
        """(n, about 30): what the Frechet distance is taken of."""
        return torch.cat([self.averages, self.sizes], dim=1)


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
    """Between the means of generated and true averages, in the true ones' deviations, root mean square over them."""
    mean_floor: float
    """The same between two halves of the true states."""
    distance: float
    """Frechet, between the features of generated and true states, in the true ones' deviations."""
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
    side: int
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
        return f"level {level} (t = {bounds[level + 1]} to {bounds[level]}, {self.side >> level} px)"

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


def draw(subject: Subject, start: str, first: int, count: int) -> tuple[Tensor, dict[int, States]]:
    """Images number ``first`` on from a start, uint8 (count, 3, H, W), and the states at turning points on the way.

    The states, by k, are those of ``free`` alone. Images do not depend on how they are split over calls.
    """
    process, parts = subject.process, []
    seen: dict[int, list[States]] = {}

    def keep(progress: Progress) -> None:
        if start == FREE and progress.level and progress.s == process.schedule.span(progress.level)[0]:
            seen.setdefault(progress.level, []).append(describe(progress.state, process.levels - progress.level))

    for begin in range(first, first + count, subject.batch):
        size = min(subject.batch, first + count - begin)
        if start == REAL:
            parts.append(real_images(subject, begin, size))
            continue
        state = None
        if start != FREE:
            when, _, k = start.partition("_")
            state = (
                true_states(subject, int(k), when == "after", begin, size),
                process.schedule.turning_points[int(k) - 1],
            )
        x = sample(
            process,
            subject.denoiser,
            (size, 3, subject.side, subject.side),
            start=state,
            first=begin,
            labels=_labels(subject, start, begin, size),
            device=subject.device,
            callback=keep,
            **subject.sampling,
        )
        parts.append(to_uint8(x).cpu())
    return torch.cat(parts), {k: join(found) for k, found in seen.items()}


def real_images(subject: Subject, first: int, count: int) -> Tensor:
    """Real images number ``first`` on, uint8 (count, 3, H, W)."""
    return torch.from_numpy(np.stack([image for image, _ in _real(subject, first, count)]))


def _real(subject: Subject, first: int, count: int) -> list[tuple[NDArray[np.uint8], int]]:
    """Drawn as samples of a perfect model are, each for itself, so that one may come twice; with their labels."""
    indices = [derive_seed(subject.seed, "audit image", first + i) % len(subject.images) for i in range(count)]
    return [subject.images[index] for index in indices]


def _labels(subject: Subject, start: str, first: int, count: int) -> Tensor | None:
    """The classes of images number ``first`` on: those of the real ones whose true states they start from."""
    if start == FREE or subject.label_counts is None:
        return image_labels(subject.label_counts, subject.seed, first, count)
    return torch.tensor([label for _, label in _real(subject, first, count)])


def true_states(subject: Subject, k: int, lifted: bool, first: int, count: int) -> Tensor:
    """Diffused real images at T_k: (count, 3, h, w) of level k, or of level k - 1 as a perfect lift would leave them.

    Both are of the same images with the same noise.
    """
    clean = to_float(real_images(subject, first, count)).to(subject.device)
    side = subject.side >> (k - 1)
    source = ImageNoise(derive_seed(subject.seed, "audit", k), first, count, subject.device, ahead=0)
    noise = source.normal((3, side, side))
    t = subject.process.schedule.turning_points[k - 1]
    return subject.process.diffuse(clean, t, noise if lifted else bands.down(noise))


def describe(x: Tensor, halvings: int) -> States:
    """What is kept of states (n, 3, h, w) of a level from which the process goes on to halve so often.

    The features are few, so that a few hundred states tell their covariance: 4 x 4 averages of the sum of colours, 2 x
    2 averages of the two differences, and for each finer band its root mean square in the whole state. Of a noisy state
    these coarse averages are what holds signal, at every level; the finer bands hold mostly noise, of whose signal the
    size tells most.
    """
    x = x.double()
    mixed = torch.einsum("ij,njhw->nihw", torch.tensor(_COLOURS, dtype=x.dtype, device=x.device), x)
    side = x.shape[-1]
    finer = 0
    while (side >> finer) > 4 and (side >> finer) % 2 == 0:
        finer += 1
    size = min(4, side)
    averages = torch.cat([_averages(mixed[:, :1], size), _averages(mixed[:, 1:], max(1, size // 2))], dim=1)
    sizes = bands.energies(x, finer)[:, :finer].sqrt()
    return States(bands.energies(x, halvings).cpu(), averages.cpu(), sizes.cpu())


def join(parts: Sequence[States]) -> States:
    """Several as one."""
    return States(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def compare_states(subject: Subject, k: int, generated: States) -> StateComparison:
    """Generated states just before the lift at T_k beside as many true ones."""
    # torch-fidelity, which other parts of an audit do without.
    from dvdp.evaluation.fidelity import frechet

    count = len(generated.energies)
    true = join(
        [
            describe(
                true_states(subject, k, False, first, min(CHUNK, count - first)),
                subject.process.levels - k,
            )
            for first in range(0, count, CHUNK)
        ]
    )
    energies, expected = generated.energies.mean(0), true.energies.mean(0)
    relative = [states.energies.std(0) / states.energies.mean(0) / math.sqrt(count) for states in (generated, true)]
    errors = (energies / expected).sqrt() / 2 * torch.hypot(*relative)
    # In their own deviations: features are of several kinds, and turning points should compare.
    unit = true.features.std(0).clamp(min=1e-12)
    ours, theirs = (states.features.div(unit).split([count // 2, count - count // 2]) for states in (generated, true))
    pairs = [(a, b) for a in ours for b in theirs]
    averages = slice(generated.averages.shape[1])
    return StateComparison(
        turning_point=subject.process.schedule.turning_points[k - 1],
        level=k,
        generated=tuple(energies.sqrt().tolist()),
        true=tuple(expected.sqrt().tolist()),
        errors=tuple(errors.tolist()),
        # Over pairs of halves, as the floor: a distance between few states is too large, and so both are alike.
        mean_difference=sum(_apart(a[:, averages], b[:, averages]) for a, b in pairs) / len(pairs),
        mean_floor=_apart(*(part[:, averages] for part in theirs)),
        distance=sum(frechet(a, b) for a, b in pairs) / len(pairs),
        distance_floor=frechet(*theirs),
    )


def score_images(images: Dataset | Tensor, count: int, score: Callable[[Dataset], float]) -> Score:
    """The score of the first ``count`` images, and of either half of them."""
    parts = (range(count), range(count // 2), range(count // 2, count))
    value, *halves = (score(Subset(images, part)) for part in parts)  # type: ignore[arg-type]
    return Score(value, (halves[0], halves[1]))


def check_count(count: int, images: Images) -> None:
    """Raise UserError unless so many images can be audited on this data set."""
    if not FEWEST <= count <= len(images):
        raise UserError(
            f"--images: found {count}, expected at least {FEWEST} (fewer say nothing) and at most {len(images):,}, the"
            " number of images in the data set."
        )


def audit(
    process: Process,
    denoiser: Denoiser,
    images: Images,
    score: Callable[[Dataset], float],
    count: int,
    sampling: Mapping[str, Any],
    solver_steps: int | None = None,
    batch: int = 128,
    device: torch.device | str = "cpu",
    metric: str = "score",
    label_counts: Sequence[int] | None = None,
) -> Audit:
    """Audit a denoiser in memory; ``dvdp audit`` does the same with files, on workers.

    Args:
        images: the data set.
        score: of uint8 (3, H, W) images; lower is better.
        count: images behind every score.
        sampling: arguments of :func:`dvdp.sampling.sample`.
        solver_steps: see :func:`solver_sampling`.
        label_counts: see :attr:`Subject.label_counts`.

    Raises:
        UserError: ``count`` is below :data:`FEWEST` or above the size of the data set; sampling arguments that do not
            fit.
    """
    check_count(count, images)
    subject = Subject(process, denoiser, images, sampling, batch, device, label_counts)
    scores: dict[str, Score] = {}
    generated: dict[int, States] = {}
    solver = solver_sampling(sampling, process.schedule.timesteps, solver_steps)
    for start in tqdm([*starts(process.levels), REAL], desc="audit", unit="start", disable=None):
        drawn, states = draw(subject, start, 0, count)
        generated |= states
        scores[start] = score_images(drawn, count, score)
    if solver is not None:
        drawn, _ = draw(dataclasses.replace(subject, sampling=solver), FREE, 0, count)
        scores[SOLVER] = score_images(drawn, count, score)
    return conclude(subject, solver, scores, generated, count, metric)


def conclude(
    subject: Subject,
    solver: Mapping[str, Any] | None,
    scores: Mapping[str, Score],
    generated: Mapping[int, States],
    count: int,
    metric: str,
    notes: Mapping[str, str] | None = None,
) -> Audit:
    """The audit from what was drawn and scored.

    Args:
        generated: states of ``free`` just before each lift, by k.
        count: images behind every score.
    """
    schedule = subject.process.schedule
    return Audit(
        metric=metric,
        images=count,
        side=subject.side,
        timesteps=schedule.timesteps,
        turning_points=schedule.turning_points,
        # As JSON gives them back: tuples become lists.
        sampling=json.loads(json.dumps(dict(subject.sampling))),
        solver=json.loads(json.dumps(solver)),
        scores=dict(scores),
        states=tuple(compare_states(subject, k, generated[k]) for k in sorted(generated)),
        notes=dict(notes or {}),
    )


def _averages(x: Tensor, size: int) -> Tensor:
    """(n, c, side, side) -> (n, c * size^2): means of so many patches, times the patch's side, as D does."""
    return F.adaptive_avg_pool2d(x, size).flatten(1) * (x.shape[-1] / size)


def _apart(a: Tensor, b: Tensor) -> float:
    return (a.mean(0) - b.mean(0)).square().mean().sqrt().item()


def _with_tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
