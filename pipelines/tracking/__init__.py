"""MLflow: the connection, runs, history, the registry, and the code of a registered model.

The disk is the first place for everything: a run's metrics and previews are files in its folder, written whether or
not MLflow answers. :class:`pipelines.tracking.sync.LedgerSync` carries them over from a thread of the driver. The rest
is idempotent: a run is found by its hash, and writing the same thing again changes nothing. So running the same command
again makes up for what an outage or a kill has kept from MLflow.
"""

import os

# Read by MLflow when it is imported and at every call. A call to a dead server fails in seconds rather than minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
