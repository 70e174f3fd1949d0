"""Whether a benchmark's ratios are still what they were: seconds differ between machines, ratios hardly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dvdp.errors import UserError


def read_ratios(path: Path) -> dict[str, float]:
    """``ratios`` of an earlier result: {name: number}, the larger the better.

    Raises:
        UserError: the file is no such result.
    """
    try:
        ratios: dict[str, float] = json.loads(path.read_text())["ratios"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--baseline: cannot read ratios from '{path}', expected the JSON of an earlier run; give its path."
        ) from None
    return ratios


def compare(earlier: Mapping[str, float], found: Mapping[str, float], tolerance: float) -> str:
    """A sentence for people, where all is well. Ratios that only one of the two has are not compared.

    Args:
        tolerance: the share by which a ratio may be lower than it was.

    Raises:
        UserError: a ratio fell by more, or nothing can be compared.
    """
    common = sorted(set(earlier) & set(found))
    if not common:
        raise UserError(
            "--baseline: found no ratio of this run in it, expected some in common; measure the same sizes."
        )
    fallen = [name for name in common if found[name] < earlier[name] * (1 - tolerance)]
    if fallen:
        worst = min(fallen, key=lambda name: found[name] / earlier[name])
        more = f" (and {len(fallen) - 1} more)" if len(fallen) > 1 else ""
        raise UserError(
            f"{worst}: found {found[worst]:.2f}{more}, expected at least {earlier[worst]:.2f} less {tolerance:.0%} as"
            " in the baseline; measure again on an idle machine, then look for what became slower."
        )
    return f"None of {len(common)} ratios is more than {tolerance:.0%} below the baseline's."
