"""What workers compute on; of a run its first rank says it in ``machine.json`` of its folder."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from dvdp.config import ClusterParams
from dvdp.files import write_atomically
from dvdp.hardware import device_name
from pipelines.jobs.job import Job

FILE = "machine.json"


@dataclass(frozen=True)
class Machine:
    """The devices of all ranks, which are taken to be alike, and the versions of what ran on them."""

    device: str
    """Name of the GPU or the processor; empty where it is not known, as of runs of older releases."""
    gpu: bool
    devices: int
    """GPUs, or CPU cores that the run may use."""
    dvdp: str = ""
    torch: str = ""
    python: str = ""


def worker_device(params: ClusterParams) -> str:
    """What a worker computes on: the GPU that Ray gave it, or the CPU."""
    return "cuda" if params.gpu else "cpu"


def write_machine(folder: Path, gpu: bool, devices: int) -> None:
    """Say what this process runs on."""
    versions = version("dvdp"), version("torch"), platform.python_version()
    write_atomically(folder / FILE, json.dumps(asdict(Machine(device_name(gpu), gpu, devices, *versions))) + "\n")


def read_machine(job: Job) -> Machine:
    """What a job was trained on; what it would be trained on now, unnamed, where that was not written."""
    path, cluster = job.folder / FILE, job.params.cluster
    if path.is_file():
        return Machine(**json.loads(path.read_text()))
    return Machine("", cluster.gpu, cluster.num_workers * (1 if cluster.gpu else cluster.threads))
