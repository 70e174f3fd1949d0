"""Real MLflow stores and small trained models for the tests of this folder."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from mlflow import MlflowClient

from dvdp.config import Params, Run, parse_params
from dvdp.evaluation.records import ScoreRecord
from dvdp.models.export import save_model
from dvdp.models.unet import UNet
from pipelines.addresses import healthy
from pipelines.tracking.connection import connect


@functools.lru_cache(maxsize=1)
def _empty_database() -> Path:
    """Creating MLflow's tables takes seconds, copying them does not."""
    folder = Path(tempfile.mkdtemp(prefix="dvdp-test-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(folder)
    return folder / "mlflow.db"


def empty_store(folder: Path) -> MlflowClient:
    """A client of a fresh sqlite store in ``folder``."""
    shutil.copyfile(_empty_database(), folder / "mlflow.db")
    return connect(folder)


def no_check(*_: object) -> str:
    """For tests of other things than whether a version draws images."""
    return ""


def record(fd: float, **changes: object) -> ScoreRecord:
    same = ScoreRecord(
        metrics={"fd_labels": fd, "kd_labels": 0.1},
        extractor="labels",
        extractor_sha256="e" * 64,
        samples=512,
        references=1797,
        reference_digest="d" * 64,
        preprocessing="none",
        resolution=8,
        kid_subset=100,
        library="torch-fidelity 0.4.0",
        sampling={"solver": "ddpm", "steps": 250, "seed": 0},
    )
    return dataclasses.replace(same, **changes)


def values(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every value of every metric that MLflow holds, as (step, value), by step."""
    return {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
        for key in client.get_run(run_id).data.metrics
    }


def write_ledger(folder: Path, losses: Mapping[int, float], start: float = 1.7e9) -> None:
    """``metrics.jsonl`` with a loss and a speed for each number of images."""
    entries = [
        {"images": images, "time": start + images, "metrics": {"loss": loss, "speed": 2 * loss}}
        for images, loss in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def small_run(name: str = "dvdp-300", seed: int = 0) -> Run:
    """A run whose network is tiny and whose images have 8 px."""
    params: Params = parse_params(
        {
            "dataset": {"resolution": 8},
            "settings": {name: {"process": "dvdp", "turning_points": [300]}},
            "seeds": [seed],
            "model": {
                "model_channels": 8,
                "channel_mult": [1],
                "attention_factors": [],
                "num_head_channels": 8,
                "num_classes": 0,
            },
            "training": {"preview_steps": 4},
            "sampling": {"steps": 4, "count": 8, "seed": 3},
            "evaluation": {"samples": 8, "kid_subset": 4},
        }
    )
    return params.runs()[0]


def small_model(path: Path, seed: int = 0, labels: Sequence[str] = (), label_dropout: float = 0.0) -> Path:
    """A model file of an untrained network, which is told these classes."""
    run = small_run(seed=seed)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, num_classes=len(labels)),
        training=dataclasses.replace(run.training, label_dropout=label_dropout),
    )
    torch.manual_seed(seed)
    network = UNet(run.model, len(run.turning_points))
    for parameter in network.parameters():
        # Some layers start at zero, which would hide the weights from the images.
        torch.nn.init.normal_(parameter, std=0.1)
    about = {"run": run.describe(), "labels": list(labels), "label_counts": [*(1 for _ in labels), 0]}
    save_model(path, network.state_dict(), about)
    return path


def free_port() -> int:
    """A port that nobody listens on, for now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real server over the store in ``folder``, in a session of its own; killed at the end."""
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    artifacts = ["--artifacts-destination", (folder / "artifacts").as_uri()]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store, *artifacts]
    with _server(folder, command, f"http://127.0.0.1:{port}/health", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false") as one:
        yield one


@contextlib.contextmanager
def prefect_server(folder: Path, port: int) -> Iterator[str]:
    """A real server with its data in ``folder``, in a session of its own; yields its API's address."""
    address = f"http://127.0.0.1:{port}/api"
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    own = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": address}
    with _server(folder, command, f"{address}/health", **own):
        yield address


@contextlib.contextmanager
def _server(folder: Path, command: Sequence[str], health: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        wait_until(lambda: healthy(health, 2), 120)
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a session leader and all of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Raise unless ``condition()`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {seconds} s")
        time.sleep(0.1)
