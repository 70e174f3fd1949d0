"""Metrics and previews of a run's folder, carried to MLflow from a thread."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from dvdp.errors import UserError
from dvdp.training import ledger
from pipelines.tracking.connection import TrackingUnavailable, _reason, is_temporary, unavailable
from pipelines.tracking.runs import _BATCH, TrackedRun, _parts

logger = logging.getLogger("dvdp.tracking")
#: Seconds between attempts while MLflow is unavailable, at most.
_MAX_PAUSE = 30.0


class LedgerSync:
    """Carries ``metrics.jsonl`` and ``previews/*.png`` of a run's folder to MLflow, from a thread.

    For each metric and step MLflow gets one value, the first that was carried over, whatever happens to the driver,
    the workers, the ledger (which a resumed training shortens) or the server: what MLflow has is read at the start
    and after every call that failed, as that may have half happened. An unavailable server is tried again for ever,
    but at the end what can never work is not.

    As a context manager it starts, and closes at the end of the block; if the block raised, that is the error raised.

    Args:
        folder: of the run.
        find: opens the run in MLflow, and may log what is known at the start; called in the thread, and again after
            every failure.
        interval: seconds between looks at the folder.
    """

    def __init__(
        self, client: MlflowClient, folder: Path, find: Callable[[], TrackedRun], interval: float = 5.0
    ) -> None:
        self._client = client
        self._folder = Path(folder)
        self._find = find
        self._interval = interval
        self._closing = threading.Event()
        self._deadline = 0.0
        self._problem: Exception | None = None
        self._run: TrackedRun | None = None
        self._known: dict[str, set[int]] = {}
        """Steps that MLflow has, by metric."""
        self._previews: set[int] = set()
        self._seen: tuple[int, int, int] | None = None
        """State of the ledger when all of it was carried over."""
        self._thread = threading.Thread(target=self._work, name="ledger-sync", daemon=True)

    def start(self) -> LedgerSync:
        """Begin; returns itself."""
        self._thread.start()
        return self

    def close(self, timeout: float = 60.0) -> None:
        """Carry over what is left, and stop.

        Args:
            timeout: seconds to go on trying while MLflow is unavailable.

        Raises:
            TrackingUnavailable: it still is, or does not take what it is given.
            UserError: what ``find`` raised.
        """
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join()
        if isinstance(self._problem, UserError):
            raise self._problem
        if self._problem is not None:
            raise unavailable(self._client.tracking_uri, self._folder, self._problem) from self._problem

    def __enter__(self) -> LedgerSync:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(timeout=2.0)
        except (TrackingUnavailable, UserError) as problem:
            logger.warning("%s", problem)

    def _work(self) -> None:
        pause = 0.0
        while True:
            closing = self._closing.wait(pause)
            fresh = self._run is None  # Otherwise it may be the run that was deleted, and another is found.
            if self._attempt():
                if closing:
                    return
                pause = self._interval
            elif not closing:
                pause = min(max(2 * pause, self._interval), _MAX_PAUSE)
            elif time.monotonic() >= self._deadline or (fresh and self._problem and not is_temporary(self._problem)):
                return
            else:
                time.sleep(0.5)

    def _attempt(self) -> bool:
        try:
            if self._run is None:
                self._run = self._find()
                self._read_known(self._run)
            carried = self._carry_metrics(self._run) + self._carry_previews(self._run)
        except Exception as error:  # Tracking never ends a training: whatever it is, close() tells.
            if self._problem is None:
                logger.warning(
                    "MLflow did not take metrics (%s); the run goes on, and they wait in %s",
                    _reason(error),
                    self._folder,
                )
            self._problem = error
            self._forget()
            return False
        if self._problem is not None:
            logger.warning("MLflow is back and has everything of %s (%d new values)", self._folder, carried)
            self._problem = None
        return True

    def _forget(self) -> None:
        self._run, self._seen = None, None
        self._known, self._previews = {}, set()

    def _read_known(self, run: TrackedRun) -> None:
        for key in self._client.get_run(run.run_id).data.metrics:
            history = self._client.get_metric_history(run.run_id, key)
            self._known[key] = {entry.step for entry in history}
        names = [artifact.path for artifact in self._client.list_artifacts(run.run_id, "images")]
        self._previews = {int(found[1]) for name in names if (found := re.search(r"preview\+step\+(\d+)\+", name))}

    def _carry_metrics(self, run: TrackedRun) -> int:
        path = self._folder / "metrics.jsonl"
        seen = _state(path)
        if seen == self._seen:
            return 0
        new = {
            (key, entry.images): Metric(key, float(value), int(entry.time * 1000), entry.images)
            for entry in ledger.read(path)
            for key, value in entry.metrics.items()
            if entry.images not in self._known.get(key, ())
        }
        for part in _parts(list(new.values()), _BATCH["metrics"]):
            self._client.log_batch(run.run_id, metrics=part, synchronous=True)
            for metric in part:
                self._known.setdefault(metric.key, set()).add(metric.step)
        self._seen = seen
        return len(new)

    def _carry_previews(self, run: TrackedRun) -> int:
        files = {int(path.stem): path for path in self._folder.glob("previews/*.png") if path.stem.isdigit()}
        new = sorted(files.keys() - self._previews)
        for step in new:
            with Image.open(files[step]) as image:
                self._client.log_image(run.run_id, image, key="preview", step=step, synchronous=True)
            self._previews.add(step)
        return len(new)


def _state(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
