"""What experiments leave behind that were killed, and its end at the next start.

Whatever ends a process, a reboot included, the system drops its locks. A flow run holds ``.services/running/<id>.lock``
while it lasts, its runs in MLflow carry the id as a tag, and what the command starts carries its process in the
environment. What nobody holds any more is dead.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

import psutil

from dvdp.files import locked
from pipelines.webhook import tell

logger = logging.getLogger("dvdp.left_behind")

RUNNING = Path(".services/running")
#: In the environment of all that a command starts: the command's process, and when and where it began.
MARK = "DVDP_STARTED_BY"


def mark_children() -> None:
    """Let whatever this process starts be known as its own."""
    os.environ[MARK] = " ".join([*_process(psutil.Process()), str(Path.cwd())])


def end_orphans() -> None:
    """Kill what a command of this folder has started that has ended itself, e.g. Prefect's temporary server."""
    alive = {_process(process) for process in psutil.process_iter()}
    for process in psutil.process_iter(["environ"]):
        # No environment can be read of other users' processes and of zombies.
        mark = (process.info["environ"] or {}).get(MARK, "").split(" ", 2)
        if len(mark) == 3 and mark[2] == str(Path.cwd()) and (mark[0], mark[1]) not in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()


def end_processes(processes: Sequence[psutil.Process], patience: float) -> None:
    """Tell processes to end, and kill those that still live after ``patience`` seconds."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=patience)


def _process(process: psutil.Process) -> tuple[str, str]:
    """Two processes with the same number began at different times."""
    with contextlib.suppress(psutil.Error):
        return str(process.pid), f"{process.create_time():.1f}"
    return "", ""


@contextlib.contextmanager
def running(flow_run: str) -> Iterator[None]:
    """Hold the lock of a flow run, and let its runs in MLflow carry its id, while the block lasts."""
    from pipelines.tracking.runs import of_flow_run

    file = RUNNING / f"{flow_run}.lock"
    with locked(file), of_flow_run(flow_run):
        try:
            yield
        except Exception:  # Not so a signal: what it leaves behind is ended by the next start.
            file.unlink(missing_ok=True)
            raise
        file.unlink(missing_ok=True)


def end_dead_runs() -> None:
    """Let flow runs whose process is gone end as crashed, which frees their slots, and their runs in MLflow as killed.

    Needs a Prefect server. What does not answer now is tried again by the next start.
    """
    for file in RUNNING.glob("*.lock"):
        with locked(file, patience=0) as free:
            if not free:
                continue
            try:
                crash([UUID(file.stem)])
                kill_in_mlflow(file.stem)
            except Exception as error:  # It is no reason not to start.
                logger.warning("flow run %s was killed, and cannot be ended now (%s)", file.stem, error)
                return
            file.unlink(missing_ok=True)


def crash(flow_runs: list[UUID]) -> None:
    """End flow runs that have no process, and their task runs; what has ended, or is none of this server's, stays."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed, State

    def ended() -> State[None]:
        return Crashed(message="Its process was killed; the next run goes on from there.")

    begun = filters.TaskRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING])
    unfinished = filters.TaskRunFilter(state=filters.TaskRunFilterState(type=begun))
    with get_client(sync_client=True) as client:
        for identifier in flow_runs:
            with contextlib.suppress(ObjectNotFound):
                run = client.read_flow_run(identifier)
                # A flow run that was told to end may have ended itself, and not its tasks.
                of_it = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[identifier]))
                for task in client.read_task_runs(flow_run_filter=of_it, task_run_filter=unfinished):
                    client.set_task_run_state(task.id, ended(), force=True)
                if run.state is not None and not run.state.is_final():
                    client.set_flow_run_state(identifier, ended(), force=True)
                    logger.info("flow run %s was killed earlier, and is marked as crashed now", identifier)
                    tell(client.read_flow(run.flow_id).name, run, ended())


def kill_in_mlflow(flow_run: str) -> None:
    """End the runs in MLflow that a flow run has left unfinished."""
    from pipelines.tracking.connection import connect, there_is_a_store
    from pipelines.tracking.runs import kill_runs_of

    if there_is_a_store():
        kill_runs_of(connect(), flow_run)
