"""``training.start: models:/...``: the version that it is, found once and kept, and its weights as a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from dvdp.config import Params
from dvdp.files import write_atomically

logger = logging.getLogger("dvdp.starts")
WHERE = "training.start"


def fetch_starts(params: Params) -> Params:
    """The params with a file in place of every registered model that training starts from.

    An alias is followed once, and the version kept in ``<cluster.storage>/starts``: an alias that moves, as `champion`
    does, must not make what is trained a stranger to its own params.

    Raises:
        UserError: there is no such version, or MLflow does not answer.
    """
    settings = dict(params.settings)
    for name, setting in params.settings.items():
        own = setting.overrides.get("training", {})
        if isinstance(own.get("start"), str):
            training = {**own, "start": _file(params, own["start"])}
            settings[name] = dataclasses.replace(setting, overrides={**setting.overrides, "training": training})
    start = params.training.start and _file(params, params.training.start)
    return dataclasses.replace(params, settings=settings, training=dataclasses.replace(params.training, start=start))


def _file(params: Params, address: str) -> str:
    if not address.startswith("models:"):
        return address
    name = hashlib.sha256(address.encode()).hexdigest()[:12]
    kept = params.cluster.storage / "starts" / f"model-{name}.json"
    known = json.loads(kept.read_text()) if kept.is_file() else None
    if known is None or not Path(known["weights"]).is_file():
        # Imports MLflow, which takes seconds.
        from pipelines.tracking.lookup import fetched, looked_up

        wanted = known["version"] if known else address
        with looked_up(params, wanted, WHERE) as (client, version):
            weights = fetched(client, params, version, wanted, WHERE)
        known = {"start": address, "version": f"models:/{version.name}/{version.version}", "weights": str(weights)}
        write_atomically(kept, json.dumps(known, indent=2) + "\n")
    logger.info("training.start: %s is %s, '%s' (kept in %s)", address, known["version"], known["weights"], kept)
    return str(known["weights"])
