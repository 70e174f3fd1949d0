"""What of a ``dvc repro`` is neither training, sampling nor scoring, and what it is instead.

    python -m benchmarks.orchestration --out benchmarks/results/orchestration.json

Runs the pipeline in a fresh clone of the commit that is checked out here, in the environment of this Python. All times
come from what the pipeline leaves anyway: the lines and bars that it shows, and when it wrote its files. What is no
work takes about as long however much work there is, so a share is that of these params.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from dvdp.config import read_params
from dvdp.errors import UserError
from dvdp.files import write_atomically
from pipelines.jobs.cluster import WORKER_ENVIRONMENT
from pipelines.jobs.paths import DataPaths

#: A terminal's colours and cursor movements.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Line(NamedTuple):
    """What was shown, and when."""

    time: float
    """Unix seconds."""
    text: str


class Span(NamedTuple):
    """From when to when, in unix seconds."""

    start: float
    end: float


def main() -> int:
    """Run, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, help="a project folder in which nothing ran yet; default: a clone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            project = options.project or clone(Path(folder) / "project")
            # Of what else runs here: it slows all parts, and those of many processes most.
            load = os.getloadavg()[0]
            span, lines = run(project)
            result = {"machine": machine(), "load_average_before": load, **measure(project, span, lines)}
    except UserError as error:
        print(f"orchestration: {error}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=2) + "\n"
    if options.out:
        write_atomically(options.out, text)
    print(text)
    return 0


def clone(folder: Path) -> Path:
    """This checkout's commit as a project folder."""
    subprocess.run(["git", "clone", "--quiet", str(Path(__file__).resolve().parents[1]), str(folder)], check=True)
    return folder


def run(project: Path) -> tuple[Span, list[Line]]:
    """``dvc repro`` in a project folder, from its start to its end, and all that it showed.

    Raises:
        UserError: something ran there before, or it fails.
    """
    if (project / "dvc.lock").exists() or (project / "runs").exists():
        raise UserError(f"--project: found '{project}' where dvc repro ran before, expected a fresh copy; make one.")
    environment = {
        **os.environ,
        # As the Makefile says.
        **{name: value for name, value in WORKER_ENVIRONMENT.items() if name.startswith("MALLOC_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project.resolve()),
        "PREFECT_LOGGING_COLORS": "false",
    }
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    # On a terminal nothing that is shown waits in a buffer, and every piece of work shows its bar.
    shown, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (50, 200))
    start = time.time()
    process = subprocess.Popen(["dvc", "repro"], cwd=project, env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    lines = list(_read(shown))
    status = process.wait()
    span = Span(start, time.time())
    os.close(shown)
    if status:
        last = "\n".join(line.text for line in lines[-20:])
        raise UserError(f"dvc repro: found exit status {status} in '{project}', expected 0; it ended with:\n{last}")
    return span, lines


def _read(terminal: int) -> Iterable[Line]:
    """What is shown on a terminal, as it comes: whole lines, and states of a bar."""
    left = b""
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # how a terminal says that its last program is gone
            return
        now = time.time()
        *whole, left = re.split(rb"[\r\n]+", left + read)
        # A bar ends its line with the next one's start.
        for text in (*whole, left):
            yield Line(now, CONTROL.sub("", text.decode(errors="replace")))


def measure(project: Path, span: Span, lines: Sequence[Line]) -> dict[str, Any]:
    """Where the time of a ``dvc repro`` went.

    Args:
        span: of the whole of it.
        lines: what it showed.

    Returns:
        ``seconds`` in all, ``seconds_to_first_step``, and ``jobs_at_a_time``, the mean while there are any; for each of
        two ways to count, the seconds in which nothing trains, samples or scores, their share, and what they are.
        ``orchestration`` takes the extractor's training and the reference's features for scoring,
        ``orchestration_and_preparation`` does not: everything before the first step counts. Preparing data is
        orchestration in both.

    Raises:
        UserError: the pipeline has not left what is needed.
    """
    places = DataPaths.of(read_params(project / "params.yaml"))
    data = project / places.data
    runs = sorted((project / "runs").glob("*/weights.safetensors"), key=_written)
    if not runs:
        raise UserError(f"--project: found no trained run in '{project}/runs', expected one of each setting.")
    first_step = min(_written(weights.with_name("estimate.json")) for weights in runs)

    def shown(pattern: str) -> float:
        """When it was first shown."""
        return _shown(lines, pattern)[0]

    def last_shown(pattern: str) -> float:
        return _shown(lines, pattern)[-1]

    extractor = Span(shown(r"^extractor \("), _written(data / "extractor" / "extractor.safetensors"))
    reference = Span(shown("^reference:? "), _written(data / "reference" / "reference.json"))
    jobs = [span for weights in runs for span in (_training(weights), *_sampling(weights.parent))]
    jobs += _scoring(lines)
    # What had ended by when, in the order of the pipeline.
    ends = {
        "dvc: start": shown("^Running stage 'prepare'"),
        "prepare: start-up": shown("^prepare "),
        "prepare": shown("^Running stage 'extractor'"),
        "extractor: start-up": extractor.start,
        "extractor: training": extractor.end,
        "extractor: end": shown("^Running stage 'reference'"),
        "reference: start-up": reference.start,
        "reference: features": reference.end,
        "reference: end": shown("^Running stage 'experiment'"),
        "experiment: imports": shown("Starting temporary server"),
        "experiment: start of Prefect": shown("Beginning flow run"),
        "experiment: start of Ray and MLflow": min(_written(weights.with_name("run.json")) for weights in runs),
        "experiment: start of Ray Train": min(_written(weights.with_name("lock")) for weights in runs),
        "experiment: trial of a step": first_step,
        "experiment: between jobs": max(job.end for job in jobs),
        "experiment: registration": last_shown("'register .* - Finished in state"),
        "experiment: comparison": last_shown("'compare.* - Finished in state"),
        "experiment: end": last_shown("^Updating lock file|^Generating lock file"),
        "dvc: end": span.end,
    }
    seconds = span.end - span.start
    return {
        "seconds": seconds,
        "seconds_to_first_step": first_step - span.start,
        "jobs_at_a_time": sum(job.end - job.start for job in jobs) / covered(jobs, span),
        "orchestration": _rest(span, ends, [*jobs, extractor, reference]),
        "orchestration_and_preparation": _rest(span, ends, jobs),
    }


def _rest(span: Span, ends: Mapping[str, float], work: Sequence[Span]) -> dict[str, Any]:
    parts = uncovered(span.start, ends, work)
    seconds = sum(parts.values())
    return {"seconds": seconds, "share": seconds / (span.end - span.start), "parts": parts}


def uncovered(start: float, ends: Mapping[str, float], work: Sequence[Span]) -> dict[str, float]:
    """Seconds of consecutive phases in which no work was done.

    Args:
        ends: of the phases, in their order; the first begins at ``start``, the others where the one before ended.
    """
    phases = [Span(*pair) for pair in pairwise([start, *ends.values()])]
    return {name: phase.end - phase.start - covered(work, phase) for name, phase in zip(ends, phases, strict=True)}


def covered(work: Iterable[Span], within: Span) -> float:
    """Seconds of a span in which at least one piece of work was done."""
    total, reached = 0.0, within.start
    for start, end in sorted(work):
        total += max(0.0, min(end, within.end) - max(start, reached))
        reached = max(reached, end)
    return total


def _training(weights: Path) -> Span:
    """From the first step to the last, with the previews and checkpoints between."""
    return Span(_written(weights.with_name("estimate.json")), _written(weights))


def _sampling(folder: Path) -> list[Span]:
    """Of each shard."""
    shards = sorted(folder.glob("samples/*/*.seconds"))
    return [Span(_written(shard) - float(shard.read_text()), _written(shard)) for shard in shards]


def _scoring(lines: Sequence[Line]) -> list[Span]:
    """Of each setting: its score is made as soon as its samples are there."""
    found: dict[tuple[str, str], float] = {}
    for line in lines:
        if told := re.search(r"'(sample|score) (.+)' - Finished in state", line.text):
            found.setdefault((told[1], told[2]), line.time)
    return [Span(found["sample", name], end) for (kind, name), end in found.items() if kind == "score"]


def _shown(lines: Sequence[Line], pattern: str) -> list[float]:
    times = [line.time for line in lines if re.search(pattern, line.text)]
    if not times:
        raise UserError(
            f"dvc repro: found nothing like '{pattern}' in what it showed, expected it; look at its output."
        )
    return times


def _written(file: Path) -> float:
    return file.stat().st_mtime


if __name__ == "__main__":
    sys.exit(main())
