"""End the flow runs that an earlier worker left behind without a process, then become the worker.

A flow run that was killed together with its worker, by a reboot or with the services, has nobody to report its end: it
would hold its deployment's slot for ever. Flows whose worker alone was killed go on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from uuid import UUID

import psutil

from pipelines.left_behind import crash, end_dead_runs, end_orphans

POOL = "dvdp"


def without_process() -> list[UUID]:
    """Flow runs of the pool that the server takes for running and that have no process here."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType

    begun = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=begun)),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        )
    found = [process.info["environ"] or {} for process in psutil.process_iter(["environ"])]
    alive = {environment.get("PREFECT__FLOW_RUN_ID") for environment in found}
    return [run.id for run in runs if str(run.id) not in alive]


if __name__ == "__main__":
    # supervisord starts it again, and then it looks again.
    with contextlib.suppress(Exception):
        end_orphans()
        crash(without_process())
        end_dead_runs()
    os.execvp(sys.argv[1], sys.argv[1:])
