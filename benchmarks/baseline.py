"""Whether a benchmark's ratios are still what they were: seconds differ between machines, ratios hardly.

    python -m benchmarks.baseline RESULT BASELINE

Both are results of the same benchmark, as JSON. ``ratios`` holds {name: number}, the larger the better; ``spreads``, by
the same names, how far the ratios of single turns lie apart (:func:`benchmarks.timing.spreads`); and ``left_out`` {part
of a name: why}, what the run was not asked for or could not measure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvdp.errors import UserError

#: The share by which a ratio may fall is so many of the baseline's spreads. The median of seven turns is good to 0.7
#: spreads and a difference of two to one, so this is three standard errors.
SPREADS = 3
#: But no less and no more: what is better than noise is not known of less, and more would hide what became slower.
LEAST, MOST = 0.03, 0.10
#: The share where the baseline is of before spreads were kept.
UNKNOWN = 0.07
#: Turns that a spread needs to say something.
TURNS = 7


def main() -> int:
    """Compare two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("baseline", type=Path)
    options = parser.parse_args()
    try:
        print(compare(read_result(options.result), read_result(options.baseline)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def read_result(path: Path) -> dict[str, Any]:
    """The result of a benchmark that states ratios.

    Raises:
        UserError: the file is no such result.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if all(isinstance(value, int | float) for value in result["ratios"].values()):
            return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"baseline: cannot read ratios from '{path}', expected the JSON of a benchmark's earlier run; give its path."
    )


def tolerance(baseline: Mapping[str, Any], name: str) -> float:
    """The share by which a ratio may be lower than in the baseline."""
    spreads = baseline.get("spreads", {})
    return min(max(LEAST, SPREADS * spreads[name]), MOST) if name in spreads else UNKNOWN


def compare(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """What was compared and what was not, for people, where all is well.

    Raises:
        UserError: one sentence, a line each, for every ratio that fell by more than its tolerance, is missing though
            the run should have it, or is no finite number; and for every difference in how the two were measured.
    """
    found, earlier = result["ratios"], baseline["ratios"]
    problems = []
    now, then = conditions(result), conditions(baseline)
    for name in sorted(now.keys() & then.keys()):
        if now[name] != then[name]:
            problems.append(f"{name}: found {now[name]}, expected {then[name]} as in the baseline; measure alike.")
    for what, ratios in (("this run", found), ("the baseline", earlier)):
        problems += [
            f"{name}: found {value} in {what}, expected a finite number; measure it again."
            for name, value in ratios.items()
            if not math.isfinite(value)
        ]
    skipped: dict[str, list[str]] = {}
    for name in sorted(earlier.keys() - found.keys()):
        why = next((why for part, why in result.get("left_out", {}).items() if part in name), None)
        if why is None:
            problems.append(f"{name}: found no such ratio, expected one near {earlier[name]:.2f}; measure it, too.")
        else:
            skipped.setdefault(why, []).append(name)
    common = sorted(earlier.keys() & found.keys())
    for name in common:
        share = tolerance(baseline, name)
        if found[name] < earlier[name] * (1 - share):
            problems.append(
                f"{name}: found {found[name]:.3f}, expected at least {earlier[name]:.3f} less {share:.1%} as in the"
                " baseline; measure again on an idle machine, then look for what became slower."
            )
    if not common and not problems:
        problems.append("ratios: found none that the baseline has, expected some in common; measure the same sizes.")
    if problems:
        raise UserError(" ".join(problems))
    shares = [tolerance(baseline, name) for name in common]
    lines = [f"None of {len(common)} ratios fell by more than its tolerance, {min(shares):.1%} to {max(shares):.1%}."]
    lines += [f"Not compared ({why}): {'; '.join(names)}." for why, names in skipped.items()]
    if new := sorted(found.keys() - earlier.keys()):
        lines.append(f"Not compared (the baseline lacks them): {'; '.join(new)}.")
    return "\n".join(lines)


def conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """What ratios depend on beside the code."""
    machine = result.get("machine", {})
    names = {"malloc": "MALLOC_MMAP_THRESHOLD_", "threads": "threads"}
    found = {name: machine[key] for key, name in names.items() if key in machine}
    return found | {f"images a step at {case['resolution']} px": case["batch"] for case in result.get("cases", ())}


if __name__ == "__main__":
    sys.exit(main())
