"""The record of a score: everything that it depends on, and what two scores may differ in."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dvdp.errors import UserError
from dvdp.evaluation.intervals import PARTS, Estimate

#: What a sampling mapping says that two comparable scores may differ in.
_INCIDENTAL = ("seed", "batch", "count", "first")


@dataclass(frozen=True)
class ScoreRecord:
    """A score, with all that it depends on."""

    metrics: dict[str, float]
    """E.g. ``fd_labels``, ``fd_labels_error``, ``kd_labels``, ``kd_labels_std``, ``precision_labels``,
    ``recall_labels``, ``is_labels``, ``copies``, ``fd_labels_infinity``; ``.._error`` is a standard error."""
    extractor: str
    extractor_sha256: str
    samples: int
    references: int
    """Real images; 0 where a file of statistics does not say."""
    reference_digest: str
    """Of the data set that the references were made from; ``npz <SHA-256>`` for a file of statistics."""
    preprocessing: str
    resolution: int
    """Of samples and references, in pixels."""
    kid_subset: int
    """0 where there is no KID."""
    library: str
    sampling: dict[str, Any] = field(default_factory=dict)
    """Where the samples come from: EMA profile, solver, steps, seed, ..."""
    warnings: list[str] = field(default_factory=list)
    counts: list[dict[str, float]] = field(default_factory=list)
    """What ``.._infinity`` is extrapolated from: ``{"samples", "distance"}`` each, the headline's last."""

    @property
    def headline(self) -> str:
        """The metric that ranks, lower is better: the Frechet distance (``fid``, ``fd_labels``, ``fd_rotation``)."""
        distances = [name for name in self.metrics if name == "fid" or name.startswith("fd_")]
        return next(name for name in distances if "_infinity" not in name and not name.endswith("_error"))

    @property
    def estimate(self) -> Estimate:
        """The headline's value with its error over draws of the samples; records of early releases have none."""
        return self.estimate_of(self.headline)

    def estimate_of(self, name: str) -> Estimate:
        """A metric's value with its error, as far as that is known."""
        freedom = PARTS - 1 if name.startswith(("recall", "kid", "kd")) else math.inf
        return Estimate(self.metrics[name], self.metrics.get(f"{name}_error", math.inf), freedom)

    def to_json(self) -> str:
        """The record as text; :meth:`from_json` gives back an equal one."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "score") -> ScoreRecord:
        """A record from its text.

        Args:
            source: names the text in errors, e.g. its path.

        Raises:
            UserError: the text is no record.
        """
        try:
            return ScoreRecord(**json.loads(text))
        except (json.JSONDecodeError, TypeError):
            raise UserError(
                f"{source}: found something else than a score record, expected the JSON that"
                " `dvdp evaluate` writes; evaluate again."
            ) from None


def mean_and_spread(scores: Sequence[float]) -> tuple[float, float]:
    """Over seeds: the mean, and the standard deviation, which is 0 for one seed."""
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0


def score_differences(a: ScoreRecord, b: ScoreRecord) -> list[str]:
    """The fields in which two records disagree in what matters; empty if their scores may be compared."""
    # Everything a score depends on, but where the samples come from, which is looked at key by key.
    outcome = ("metrics", "sampling", "warnings", "counts")
    names = [entry.name for entry in dataclasses.fields(a) if entry.name not in outcome]
    different = [name for name in names if getattr(a, name) != getattr(b, name)]
    # Records of other releases may hold more or fewer metrics beside the one that ranks.
    if a.headline != b.headline:
        different.append("metrics")
    keys = sorted((a.sampling.keys() | b.sampling.keys()) - set(_INCIDENTAL))
    return different + [f"sampling.{key}" for key in keys if a.sampling.get(key) != b.sampling.get(key)]
