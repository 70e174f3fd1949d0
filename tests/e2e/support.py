"""Scratch projects: a copy of the sources in a folder and git repository of its own, and real processes in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from dvdp.training import ledger
from pipelines.tracking.runs import TRAINING_HASH

SOURCES = Path(__file__).parents[2]
COPIED = (
    "dvdp", "pipelines", "infra", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", ".gitignore",
    "data/.gitignore", "dvc.yaml", "prefect.yaml",
)  # fmt: skip

#: Seconds for whatever a test waits for, on a busy machine.
LIMIT = 400


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with the values of another in it; lists and settings are replaced."""
    out = dict(tree)
    for key, value in changes.items():
        old = out.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping) and key != "settings"
        out[key] = merged(old, value) if both else value
    return out


#: The whole pipeline in seconds: digits at 16 px, two settings of some 300 to 400 steps.
_TINY: dict[str, Any] = {
    "dataset": {"name": "digits", "source": "digits", "resolution": 16},
    "settings": {"ddpm": {"process": "ddpm"}, "dvdp-600": {"process": "dvdp", "turning_points": [600]}},
    "model": {"model_channels": 8, "channel_mult": [1, 2], "attention_factors": [], "num_head_channels": 8},
    "training": {
        # The same weights on every machine.
        "precision": "fp32",
        "images": 4800,
        "batch": 16,
        "warmup_images": 100,
        "checkpoint_images": 800,
        "log_images": 320,
        "preview_images": 2400,
        "preview_count": 4,
        "preview_steps": 4,
        "ema_halflife_images": 400,
    },
    "cluster": {"num_workers": 1, "threads": 1, "busy": "share"},
    "sampling": {"count": 64, "steps": 6, "batch": 64},
    "evaluation": {"samples": 64, "kid_subset": 20, "extractor_epochs": 1},
}

#: Every key that dvc.yaml names is in the default params.
TINY = merged(yaml.safe_load((SOURCES / "params.yaml").read_text()), _TINY)

CALM = """
import sys

import torch

from dvdp.config import read_params
from dvdp.data.store import ImageStore
from dvdp.evaluation.figures import grid, save_png
from dvdp.training.loop import train
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.job import jobs

torch.set_num_threads(1)
params = read_params()
if params.cluster.num_workers > 1:
    torch.distributed.init_process_group("gloo")
for job in jobs(params):
    if job.run.setting in sys.argv[1:]:
        preview = lambda _, samples, path: save_png(grid(samples), path)
        store = ImageStore(DataPaths.of(params).store)
        told = store.metadata.model_metadata(len(job.run.turning_points))
        train(job.run, store, job.folder, job.training_hash, description=told, preview=preview)
        (job.folder / "run.json").write_text('{"run": {"setting": "%s"}}' % job.run.setting)
"""


@dataclass
class Project:
    """A project folder. Commands run in it as a user would type them."""

    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def create(cls, folder: Path, **changes: Any) -> Project:
        """Copy the sources, write :data:`TINY` with changes as ``params.yaml``, and commit all of it."""
        for name in COPIED:
            source, target = SOURCES / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        project = cls(folder)
        project.write_params(**changes)
        project.run("git", "init", "--quiet")
        project.commit()
        return project

    def copy(self, folder: Path, **changes: Any) -> Project:
        """A project that starts where this one stands, with other params."""
        shutil.copytree(self.folder, folder, symlinks=True)
        project = Project(folder)
        project.write_params(**changes)
        return project

    def write_params(self, file: str = "params.yaml", **changes: Any) -> None:
        """Write :data:`TINY` with changes."""
        (self.folder / file).write_text(yaml.safe_dump(merged(TINY, changes), sort_keys=False))

    def commit(self) -> None:
        """Everything that git does not ignore."""
        self.run("git", "add", "--all")
        author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        self.run("git", *author, "commit", "--quiet", "--message=test")

    def environment(self, **more: str) -> dict[str, str]:
        """Of every command: this project's sources and programs, nothing of the caller's services."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(self.folder / ".services" / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        # Without compiled files every process of a run compiles its libraries again, which doubles the time.
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE"):
            environment.pop(name, None)
        return environment | more

    def run(self, *command: str, status: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        """A command to its end, which must be ``status``."""
        # Files, as a pipe stays open until the last worker that a command leaves behind has ended.
        with TemporaryFile("w+") as printed, TemporaryFile("w+") as errors:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self.environment(**more),
                stdout=printed,
                stderr=errors,
                check=False,
                timeout=2 * LIMIT,
            )
            printed.seek(0)
            errors.seek(0)
            done.stdout, done.stderr = printed.read(), errors.read()
        shown = f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        assert done.returncode == status, f"exit status {done.returncode} of {shown}"
        return done

    def start(self, *command: str, log: str = "command.log", **more: str) -> subprocess.Popen[bytes]:
        """A command in a process group of its own; its output goes to a file beside the sources."""
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes], status: int = 0, log: str = "command.log") -> str:
        """Wait for a started command, whose end must be ``status``; returns all that it printed."""
        process.wait(2 * LIMIT)
        printed = (self.folder / log).read_text()
        assert process.returncode == status, f"exit status {process.returncode}: {printed[-6000:]}"
        return printed

    def train_in_peace(self, *settings: str) -> None:
        """The plain training loop, without Ray and what comes with it, on as many ranks as the params say."""
        script = self.folder / "calm.py"
        script.write_text(CALM)
        ranks = str(yaml.safe_load((self.folder / "params.yaml").read_text())["cluster"]["num_workers"])
        distributed = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks) if ranks > "1" else ()
        self.run(sys.executable, *distributed, str(script), *settings)

    def close(self) -> None:
        """End whatever was started here and still runs."""
        for process in self.started:
            end(process)

    def runs(self, storage: str = "runs") -> dict[str, Path]:
        """The run folders, by the name of their setting; of several of a setting, one that is finished."""
        files = sorted(
            (self.folder / storage).glob("*/run.json"), key=lambda file: (file.parent / "weights.safetensors").exists()
        )
        return {json.loads(file.read_text())["run"]["setting"]: file.parent for file in files}

    def checkpoints(self, storage: str = "runs") -> set[Path]:
        """All that are there now."""
        return set((self.folder / storage).glob("*/checkpoints/*.safetensors"))


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a command and whatever is left of its process group and its children."""
    kill_children(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_children(pid: int) -> None:
    """SIGKILL to a process's children and theirs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Ray processes that train for a command."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def sentence(printed: str) -> str:
    """The one line with which ``dvdp`` says what went wrong."""
    (line,) = (line for line in printed.splitlines() if line.startswith("dvdp: "))
    return line.removeprefix("dvdp: ")


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Raise unless ``condition()`` becomes true in time, and while the process runs."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process is None or process.poll() is None, f"ended with status {process.returncode} before that"
        assert time.monotonic() < deadline, f"still waiting after {LIMIT} s"
        time.sleep(0.05)


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit, of two run folders."""
    first, second = (load_file(folder / "weights.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All losses of a run folder's ledger, as (images, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in ledger.read(folder / "metrics.jsonl"):
        for name, value in entry.metrics.items():
            if name.startswith("loss"):
                found.setdefault(name, []).append((entry.images, value))
    return found


def steps(folder: Path) -> dict[str, list[int]]:
    """The steps of every metric of a run folder's ledger."""
    found: dict[str, list[int]] = {}
    for entry in ledger.read(folder / "metrics.jsonl"):
        for name in entry.metrics:
            found.setdefault(name, []).append(entry.images)
    return found


def tracked_once(project: Project, setting: str, address: str | None = None) -> None:
    """MLflow has one value for each metric and step of the ledger, the losses equal."""
    client = MlflowClient(address or f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dvdp")
    assert experiment is not None
    folder = project.runs()[setting]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{TRAINING_HASH}` = '{folder.name}'")
    assert run.info.status == "FINISHED"
    for name, expected in steps(folder).items():
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == expected, name
        if name in losses(folder):
            assert [(metric.step, metric.value) for metric in history] == losses(folder)[name]


@contextlib.contextmanager
def started(project: Project, command: Sequence[str], log: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command for as long as the block lasts."""
    process = project.start(*command, log=log)
    try:
        yield process
    finally:
        end(process)
