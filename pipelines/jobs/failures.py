"""Why work on the cluster stopped: what a worker raised, or how it ended without raising anything."""

from __future__ import annotations

import contextlib
import json
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dvdp.errors import UserError
from dvdp.files import write_atomically
from dvdp.out_of_memory import OutOfMemory, ran_out
from pipelines.logs import MOST_BYTES

#: File with the tracebacks of workers, in the folder of what they worked on.
ERRORS = "errors.txt"
#: Characters of an exception that are shown; the rest is in its traceback.
SHOWN = 2000


@dataclass(frozen=True)
class Raised:
    """An exception of a worker, as it is told to the driver."""

    cause: str
    """Its name and whole message in one line; of a UserError the sentence alone."""
    mistake: bool
    """A UserError, which would be raised again."""
    memory: bool
    """There was none left."""
    traceback: str
    gpu: bool = False
    """The memory of a GPU."""
    told: bool = False
    """The cause is a sentence of ours."""

    @classmethod
    def of(cls, error: Exception) -> Raised:
        """An exception that is being handled."""
        told, memory = isinstance(error, UserError), ran_out(error)
        gpu = isinstance(error, OutOfMemory) and error.gpu
        cause = str(error) if told else one_line(error)
        return cls(cause, told and not memory, memory, traceback.format_exc(), gpu, told)

    def write(self, path: Path) -> None:
        """For :func:`take`."""
        write_atomically(path, json.dumps(asdict(self)))


def take(paths: Sequence[Path], folder: Path) -> list[Raised]:
    """What workers wrote, the first first; the files are removed, and tracebacks added to ``ERRORS`` of the folder."""
    found = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        found.append(Raised(**json.loads(path.read_text())))
        path.unlink()
        if not found[-1].mistake:
            keep(found[-1].traceback, folder)
    return found


def keep(text: str, folder: Path) -> Path:
    """Add a traceback to ``ERRORS`` of a folder, if there is space for it; returns the file."""
    with contextlib.suppress(OSError):
        if (folder / ERRORS).exists() and (folder / ERRORS).stat().st_size > MOST_BYTES:
            (folder / ERRORS).replace(folder / f"{ERRORS}.1")
    with contextlib.suppress(OSError), (folder / ERRORS).open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text.rstrip()}\n\n")
    return folder / ERRORS


def one_line(error: BaseException) -> str:
    """Name and whole message of an exception in one line, with what it was raised from; no frames of C++."""
    text = "".join(traceback.format_exception_only(error))
    text = " ".join(re.split(r"\n\s*(?:Exception raised from |frame #0|C\+\+ CapturedTraceback)", text)[0].split())
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return f"{text} (from {one_line(error.__cause__)})" if error.__cause__ else text


@dataclass(frozen=True)
class Failure:
    """Why work stopped."""

    text: str
    """What happened, as a clause."""
    memory: bool = False
    """For want of memory."""
    gpu: bool = False
    """Of a GPU's memory, which runs do not share; of any other, fewer runs at a time may help."""
    again: bool = True
    """Another try may help."""


def explain(
    error: BaseException,
    raised: Sequence[Raised] = (),
    killed_for_memory: bool = False,
    actor: str = "Ray's controller of the workers",
) -> Failure:
    """Tell apart what failed.

    Args:
        error: what Ray raised in the driver.
        raised: what workers raised, the first first.
        killed_for_memory: the system has killed a process of this machine for want of memory meanwhile.
        actor: what has died where Ray says that of an actor.
    """
    from ray import exceptions, train

    parts = list(_parts(error))
    if any(isinstance(part, exceptions.OutOfMemoryError) for part in parts):
        return Failure("Ray ended it, as this machine or its container was running out of memory", memory=True)
    died = [part for part in parts if isinstance(part, (exceptions.RayActorError, exceptions.WorkerCrashedError))]
    if died and killed_for_memory:
        return Failure("the system killed a process of it for want of memory", memory=True)
    if died and not any(getattr(part, "actor_init_failed", False) for part in died):
        worker = isinstance(error, (train.WorkerGroupError, exceptions.WorkerCrashedError))
        which = "a worker" if worker else actor
        return Failure(f"{which} was killed by a signal or crashed, and raised nothing")
    if raised:
        told = raised[0].cause.removeprefix("training: ").rstrip(".")
        text = told if raised[0].told else f"a worker raised {raised[0].cause}"
        return Failure(text, raised[0].memory, raised[0].gpu)
    if isinstance(error, train.WorkerGroupError):
        return Failure(f"a worker raised {one_line(next(iter(error.worker_failures.values())))}")
    if isinstance(error, exceptions.RayTaskError):
        return Failure(f"a worker raised {one_line(error.cause)}")
    cause = getattr(error, "controller_failure", error)
    return Failure(f"Ray could not run it: {one_line(cause)}", again=False)


def _parts(error: BaseException | None) -> Iterator[BaseException]:
    """An exception of Ray and all that it holds."""
    if error is None:
        return
    yield error
    yield from _parts(error.__cause__)
    for name in ("health_check_failure", "controller_failure"):
        yield from _parts(getattr(error, name, None))
    for each in getattr(error, "worker_failures", {}).values():
        yield from _parts(each)


def killed_for_memory() -> int:
    """How many processes of this machine the system has killed for want of memory since it was started; Linux."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) if found else 0
