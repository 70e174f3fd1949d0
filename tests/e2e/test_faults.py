"""SIGKILL in the middle of training: the run ends with the weights of an undisturbed one, and each value once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable

import psutil
import pytest
from mlflow import MlflowClient

from dvdp.training import ledger
from dvdp.training.loop import PATIENCE
from pipelines.tracking.runs import TRAINING_HASH
from tests.e2e.support import Project, assert_same_weights, losses, steps, tracked_once, wait_until, workers
from tests.tracking.support import free_port

MakeProject = Callable[..., Project]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_worker_is_killed_ends_as_if_nothing_had_happened(
    project: MakeProject, undisturbed: Project
) -> None:
    here = project()
    process = here.start("dvdp", "train", "--setting", "dvdp-600")
    wait_until(lambda: workers(process), process)
    (victim,) = workers(process)
    wait_until(here.checkpoints, process)
    victim.kill()
    assert not list(here.folder.glob("runs/*/weights.safetensors")), "killed in the middle"
    assert "going on after" in here.finish(process)
    same_as(undisturbed, here, "dvdp-600")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_experiment_whose_driver_is_killed_goes_on_when_run_again(
    project: MakeProject, undisturbed: Project
) -> None:
    here = project()
    command = ("dvdp", "experiment", "--reports", "reports")
    process = here.start(*command)
    # MLflow gets to know what is logged after the last checkpoint, and will be logged again.
    wait_until(lambda: logged_since_checkpoint(here, workers(process)), process)
    wait_until(lambda: known_to_mlflow(here), process)
    kill_driver(process)
    assert not list(here.folder.glob("runs/*/weights.safetensors")), "killed in the middle"

    assert "going on after" in here.finish(here.start(*command))
    for setting in ("ddpm", "dvdp-600"):
        same_as(undisturbed, here, setting)
        tracked_once(here, setting)
    assert (here.folder / "reports" / "index.html").is_file()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_an_interrupted_experiment_ends_soon_and_goes_on_where_it_stopped(
    project: MakeProject, undisturbed: Project
) -> None:
    here = project(seeds=[0, 1])
    # The first to begin, as it takes longest.
    calm = undisturbed.runs()["dvdp-600"]
    stopped = here.folder / "runs" / calm.name
    process = here.start("dvdp", "experiment", "--reports", "reports")
    wait_until(lambda: list(stopped.glob("checkpoints/*.safetensors")), process)
    training = workers(process)
    # As a terminal does on Ctrl-C: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    printed = here.finish(process, status=130)
    assert printed.splitlines()[-1].startswith("dvdp: interrupted; what is finished is kept")
    _, alive = psutil.wait_procs(training, timeout=30)
    assert not alive
    assert len(list(here.folder.glob("runs/*/run.json"))) <= 2, "no further setting began"
    assert not list(here.folder.glob("runs/*/weights.safetensors")), "interrupted in the middle"

    command = ("dvdp", "train", "--setting", "dvdp-600", "--seed", "0", "--resume")
    assert "going on after" in here.finish(here.start(*command))
    assert_same_weights(calm, stopped)
    assert losses(calm) == losses(stopped)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_two_ranks_go_on_exactly_after_a_killed_driver_and_a_killed_rank(project: MakeProject) -> None:
    changes = {"cluster": {"num_workers": 2}, "training": {"precision": "bf16", "accumulation": 2}}
    calm, here = project(**changes), project(**changes)
    calm.train_in_peace("dvdp-600")
    command = ("dvdp", "train", "--setting", "dvdp-600")

    process = here.start(*command)
    wait_until(here.checkpoints, process)
    kill_driver(process)
    before = here.checkpoints()
    assert not list(here.folder.glob("runs/*/weights.safetensors")), "killed in the middle"

    process = here.start(*command)
    wait_until(lambda: len(workers(process)) == 2, process)
    _, victim = workers(process)
    wait_until(lambda: here.checkpoints() - before, process)
    victim.kill()
    assert here.finish(process).count("going on after") == 2
    same_as(calm, here, "dvdp-600")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_driver_killed_on_a_shared_cluster_leaves_nobody_training(project: MakeProject, undisturbed: Project) -> None:
    here, port = project(), free_port()
    address = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    flags = ("--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats", "--block")
    head = here.start("ray", "start", "--head", "--port", str(port), *flags, log="head.log", **address)
    wait_until(lambda: answers(port), head)

    command = ("dvdp", "train", "--setting", "dvdp-600")
    process = here.start(*command, **address)
    wait_until(here.checkpoints, process)
    kill_driver(process, head)
    assert not list(here.folder.glob("runs/*/weights.safetensors")), "killed in the middle"
    assert "going on after" in here.finish(here.start(*command, **address))
    same_as(undisturbed, here, "dvdp-600")
    assert head.poll() is None


def kill_driver(process: subprocess.Popen[bytes], cluster: subprocess.Popen[bytes] | None = None) -> None:
    """SIGKILL to the driver alone; what trains for it, in its own cluster or another, must end by itself, and soon."""
    orphans = workers(cluster or process)
    assert orphans
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    signal_all(orphans, signal.SIGCONT)
    _, alive = psutil.wait_procs(orphans, timeout=PATIENCE / 2)
    assert not alive, "orphans would train on beside the next driver"


def answers(port: int) -> bool:
    """Whether something listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def logged_since_checkpoint(project: Project, training: list[psutil.Process]) -> bool:
    """Stop the processes that train at a moment when a run has logged something since its last checkpoint."""
    if not project.checkpoints():
        return False
    signal_all(training, signal.SIGSTOP)
    for folder in project.runs().values():
        saved = max((int(path.stem) for path in folder.glob("checkpoints/[0-9]*.safetensors")), default=0)
        if saved and ledger.read(folder / "metrics.jsonl")[-1].images > saved:
            return True
    signal_all(training, signal.SIGCONT)
    return False


def known_to_mlflow(project: Project) -> bool:
    """Whether MLflow has all that was logged."""
    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dvdp")
    if experiment is None:
        return False
    found = {run.data.tags.get(TRAINING_HASH): run for run in client.search_runs([experiment.experiment_id])}
    logged = {folder.name: len(ledger.read(folder / "metrics.jsonl")) for folder in project.runs().values()}
    return all(
        name in found and len(client.get_metric_history(found[name].info.run_id, "loss")) == count
        for name, count in logged.items()
        if count
    )


def signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def same_as(calm: Project, disturbed: Project, setting: str) -> None:
    """Weights, and losses, one value for each step."""
    one, other = calm.runs()[setting], disturbed.runs()[setting]
    assert one.name == other.name
    assert_same_weights(one, other)
    assert losses(one) == losses(other)
    assert steps(one) == steps(other)
    assert all(len(set(images)) == len(images) for images in steps(other).values())
    names = [{path.name for path in (folder / "previews").iterdir()} for folder in (one, other)]
    assert names[0] == names[1]
