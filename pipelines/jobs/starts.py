"""What settings start from: looked at by the driver, and remembered for when the file is gone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from dvdp.config import Params, Run, Start
from dvdp.files import write_atomically
from dvdp.training.start import with_start

logger = logging.getLogger("dvdp.jobs")


def started(params: Params, run: Run) -> Run:
    """The run with what its ``training.start`` holds; what was trained from a file that is gone keeps its name.

    Raises:
        UserError: see :func:`dvdp.training.start.with_start`.
    """
    address = run.training.start
    if address is None:
        return run
    known = _kept(params, address)
    if known and not Path(address).exists():
        logger.warning("%s: '%s' is gone; what was trained from it is kept", run.setting, address)
        return dataclasses.replace(run, start=Start(**known))
    run = with_start(run)
    if run.start and dataclasses.asdict(run.start) != known:
        write_atomically(_place(params, address), json.dumps({"start": address, "is": dataclasses.asdict(run.start)}))
    return run


def _kept(params: Params, address: str) -> dict[str, Any] | None:
    path = _place(params, address)
    return json.loads(path.read_text())["is"] if path.is_file() else None


def _place(params: Params, address: str) -> Path:
    return params.cluster.storage / "starts" / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}.json"
