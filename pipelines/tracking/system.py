"""How busy this machine is while a run trains, in MLflow's "System metrics"."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipelines.tracking.runs import TrackedRun

# That a server does not answer is told by the sync of metrics.
logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)


def watch_machine(run: TrackedRun) -> Callable[[], None]:
    """Log the CPUs, memory, disk, network and GPUs of this machine every 10 s, all that runs here together.

    Steps count samples of 10 s. On a cluster of several machines the driver's would say nothing of the workers', and
    nothing is logged. It ends by itself where MLflow does not answer.

    Returns:
        What ends it.
    """
    if os.environ.get("RAY_ADDRESS"):
        return lambda: None
    monitor = SystemMetricsMonitor(run.run_id, resume_logging=True, tracking_uri=run.client.tracking_uri)
    monitor.start()
    return monitor.finish
