"""``turning_points: auto``: the choice for a prepared data set, made once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging

from dvdp.config import Params, Run, SettingParams
from dvdp.data.store import StoreMetadata
from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.planning.planner import Plan, Planner
from dvdp.planning.search import candidate_points, cheapest, most_levels, search
from pipelines.jobs.job import prepared_store

logger = logging.getLogger("dvdp.turning_points")


def resolve(params: Params) -> Params:
    """The params with the planner's choice for every setting that says ``turning_points: auto``.

    A choice is made once and kept in ``<cluster.storage>/plans``: what is trained later must not move it.

    Raises:
        UserError: the data set is not prepared, nothing meets a tolerance, or MLflow does not answer.
    """
    if not any(isinstance(setting.turning_points, str) for setting in params.settings.values()):
        return params
    metadata = prepared_store(params).metadata
    settings = dict(params.settings)
    for name, setting in params.settings.items():
        if isinstance(setting.turning_points, str):
            points = _choice(params, name, metadata)
            settings[name] = dataclasses.replace(setting, turning_points=points, tolerance=None)
    return dataclasses.replace(params, settings=settings)


def band_std(metadata: StoreMetadata) -> tuple[float, ...]:
    """Of all bands of the data set, finest first.

    Raises:
        UserError: it has no statistics that plans can be made of.
    """
    std = (*metadata.detail_std, *metadata.level_std[-1:])
    if len(std) < 2 or not all(deviation > 0 for deviation in std):
        raise UserError(
            f"data set: found band std {list(std)} of '{metadata.name}', expected at least two, all above"
            " 0; prepare it again at a resolution that can be halved, and no larger than its images are."
        )
    return std


def _choice(params: Params, setting: str, metadata: StoreMetadata) -> tuple[int, ...]:
    """Turning points of a setting that says ``auto``: those chosen before, or chosen now."""
    run = params.run(setting, params.seeds[0])
    about = {
        # All that a plan depends on, and nothing else: drawing more samples must not choose anew.
        **{name: run.describe()[name] for name in ("process", "resolution", "schedule")},
        **{
            name: {k: v for k, v in run.describe()[name].items() if k != "num_classes"}
            for name in ("model", "reference_model")
        },
        "sampling": {
            k: v
            for k, v in run.describe()["sampling"].items()
            if k not in {"count", "batch", "seed", "clip", "thresholding"} | run.sampling.off
        },
        "tolerance": params.settings[setting].tolerance,
        "data": metadata.digest,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    path = params.cluster.storage / "plans" / f"{name}.json"
    if not path.exists():
        try:
            chosen, why = _choose(params, params.settings[setting], run, metadata)
        except UserError as error:
            raise UserError(f"settings.{setting}: {error}") from None
        content = {"turning_points": chosen.turning_points, "why": why, "for": about}
        write_atomically(path, json.dumps(content, indent=2) + "\n")
    kept = json.loads(path.read_text())
    logger.info("%s: turning points %s, %s (kept in %s)", setting, kept["turning_points"], kept["why"], path)
    return tuple(kept["turning_points"])


def _choose(params: Params, setting: SettingParams, run: Run, metadata: StoreMetadata) -> tuple[Plan, str]:
    # Imports MLflow, which takes seconds.
    from pipelines.tracking.connection import NoAnswer
    from pipelines.tracking.history import trained_settings

    std = band_std(metadata)
    where = "by the planner alone, as MLflow holds no trained settings like it"
    try:
        trained = trained_settings(params, run, metadata.digest)
    except NoAnswer:
        trained, where = [], "by the planner alone, as MLflow did not answer"
    covered = [entry.turning_points[0] for entry in trained if entry.process == run.process and entry.turning_points]
    points = sorted({*candidate_points(run.schedule.timesteps), *covered})
    plans = search(Planner(run, std, points), most_levels(run, len(std)), points)
    if covered:
        low, high = min(covered), max(covered)
        plans = [entry for entry in plans if not entry.turning_points or low <= entry.turning_points[0] <= high]
        where = f"with T_1 within {low} to {high}, which settings that were trained cover"
    tolerance = setting.tolerance or 0.0
    chosen = cheapest(plans, tolerance)
    return chosen, (
        f"the fastest of {len(plans)} sets ({chosen.training_speedup:.2f}x in training) whose error exceeds DDPM's by"
        f" {tolerance:g} at most (by {chosen.excess:.4f}), {where}"
    )
