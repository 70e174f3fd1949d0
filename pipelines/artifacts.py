"""Keys of what flows show in Prefect, where each key has a history."""

from __future__ import annotations

import re

#: What there is of a data set.
KINDS = ("comparison", "report", "samples", "process")


def artifact_key(kind: str, *names: str) -> str:
    """Of a kind, a data set and perhaps a setting; Prefect takes lower-case letters, digits and "-"."""
    return "-".join([kind, *(re.sub("[^a-z0-9]+", "-", name.lower()) for name in names)])
