"""Whether a registered version can be used: it loads in a process of its own, offline, and draws images of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from dvdp.evaluation.copies import copies_sentence, surely_copies
from dvdp.evaluation.records import ScoreRecord
from pipelines.addresses import public
from pipelines.tracking.runs import TURNING_POINTS

#: Tag of a version that passed, which is not tried again.
DRAWS = "dvdp.draws_images"
#: Seconds, on a busy machine.
_PATIENCE = 300.0
_COUNT = 2
_PROGRAM = """
import json, sys
import mlflow, numpy, pandas
drawn = mlflow.pyfunc.load_model(sys.argv[1]).predict(pandas.DataFrame([json.loads(sys.argv[2])]))
# Versions of early releases answer with one array.
images = numpy.stack(list(drawn["image"])) if isinstance(drawn, pandas.DataFrame) else numpy.asarray(drawn)
flat = [bool((image == image.flat[0]).all()) for image in images]
print(json.dumps({"dtype": str(images.dtype), "shape": images.shape, "flat": flat}))
"""


def flaw_of(client: MlflowClient, version: ModelVersion, record: ScoreRecord) -> str:
    """Why a version must not be champion, or the empty string.

    Args:
        record: its scores.
    """
    if surely_copies(record):
        return f"it copies training images ({copies_sentence(record).rstrip('.')})"
    return draws_images(client, version, record)


def draws_images(client: MlflowClient, version: ModelVersion, record: ScoreRecord) -> str:
    """Load a version in a clean process and draw two images in a few steps.

    Args:
        record: its scores, which say how large its images are.

    Returns:
        What is wrong with it, or the empty string.
    """
    if DRAWS in version.tags:
        return ""
    levels = 1 + len(json.loads(version.tags.get(TURNING_POINTS, "[]")))
    request = json.dumps({"count": _COUNT, "seed": 0, "steps": 2 * levels, "format": "numbers"})
    address = f"models:/{version.name}/{version.version}"
    # A GPU may be at work on something else.
    environment = {**os.environ, "MLFLOW_TRACKING_URI": client.tracking_uri, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Isolated: our sources are not on its path, but for those that lie with the model.
            done = subprocess.run(
                [sys.executable, "-I", "-c", _PROGRAM, address, request],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it drew no image within {_PATIENCE:.0f} s"
    if done.returncode:
        last = public((done.stderr.strip().splitlines() or ["without a word"])[-1])[:300]
        return f"it does not draw in a process of its own ({last.rstrip('.')})"
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [_COUNT, record.resolution, record.resolution, 3]
    if found["dtype"] != "uint8" or found["shape"] != expected:
        return f"it drew {found['dtype']} of shape {found['shape']}, expected uint8 of shape {expected}"
    if any(found["flat"]):
        # What is not finite becomes one colour.
        return "it drew images of one colour, as networks do whose numbers are not finite"
    client.set_model_version_tag(version.name, str(version.version), DRAWS, "true")
    return ""
