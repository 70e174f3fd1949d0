"""What stopped training or sampling is told in one sentence, and told apart; what may help is tried."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dvdp.config import ClusterParams, Params
from dvdp.errors import UserError
from dvdp.out_of_memory import OutOfMemory
from pipelines.jobs import train
from pipelines.jobs.cluster import Held, Slots, cluster, on_worker
from pipelines.jobs.failures import ERRORS, Raised, explain, one_line, take

Worker = Callable[[dict[str, Any]], None]


def raised_by(work: Callable[[], object]) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("raised nothing")


def test_the_message_of_an_exception_is_whole_and_in_one_line() -> None:
    def mismatch() -> None:
        torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(3, 3).state_dict())

    line = one_line(raised_by(mismatch))
    assert line.startswith("RuntimeError: Error(s) in loading state_dict for Linear: size mismatch for weight: copying")
    assert line.endswith("current model is torch.Size([3, 2]).")
    assert "\n" not in line

    frames = RuntimeError("expected '\n\"\n' here\nException raised from f at g.cpp:1\nframe #0: h")
    assert one_line(frames) == "RuntimeError: expected ' \" ' here"

    def chained() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("cannot save") from error

    assert (
        one_line(raised_by(chained)) == "RuntimeError: cannot save (from OSError: [Errno 28] No space left on device)"
    )
    assert len(one_line(ValueError("x" * 10**6))) < 2100


def test_the_first_that_was_raised_stands_first_and_tracebacks_are_kept(tmp_path: Path) -> None:
    paths = []
    for rank, error in ((1, ValueError("first")), (0, RuntimeError("Connection closed by peer"))):
        try:
            raise error
        except Exception as caught:
            paths.append(tmp_path / f"failure-a-{rank}.json")
            Raised.of(caught).write(paths[-1])
            os.utime(paths[-1], (1000 - rank, 1000 - rank))
    found = take(sorted(paths), tmp_path)
    assert [each.cause for each in found] == ["ValueError: first", "RuntimeError: Connection closed by peer"]
    assert not list(tmp_path.glob("failure-*"))
    kept = (tmp_path / ERRORS).read_text()
    assert kept.count("Traceback (most recent call last)") == 2
    assert kept.index("ValueError: first") < kept.index("RuntimeError")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"), False),
        (OutOfMemory("training: memory ran out at level 0."), True),
        (OSError(28, "No space left on device"), False),
        (UserError("training.batch: found 3."), False),
    ],
)
def test_want_of_memory_is_told_from_the_rest(error: Exception, memory: bool) -> None:
    assert Raised.of(error).memory == memory
    assert Raised.of(error).mistake == (isinstance(error, UserError) and not memory)


def test_a_sentence_on_memory_is_told_as_it_is_and_tried_again() -> None:
    for gpu in (False, True):
        raised = Raised.of(OutOfMemory("training: memory ran out at level 0; raise training.accumulation.", gpu))
        failure = explain(raised_by(lambda: torch.zeros(1)[2]), [raised])
        assert failure.text == "memory ran out at level 0; raise training.accumulation"
        assert (failure.memory, failure.gpu, failure.again) == (True, gpu, True)


def test_what_ray_raises_is_told_apart() -> None:
    from ray import exceptions
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    died = WorkerHealthCheckFailedError("A worker health check failed.", exceptions.ActorDiedError())
    collateral = RuntimeError("Connection closed by peer")
    group = WorkerGroupError("text", {0: collateral, 1: died})
    lines = [Raised("RuntimeError: Connection closed by peer", False, False, "")]

    killed = explain(group, lines)
    assert killed.text == "a worker was killed by a signal or crashed, and raised nothing"
    assert (killed.memory, killed.again) == (False, True)
    assert explain(group, lines, killed_for_memory=True).memory

    monitor = exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\n" * 200)
    for error in (monitor, WorkerGroupError("text", {0: WorkerHealthCheckFailedError("", monitor), 1: collateral})):
        found = explain(error, lines)
        assert found.memory
        assert found.text == "Ray ended it, as this machine or its container was running out of memory"

    controller = explain(exceptions.ActorDiedError())
    assert controller.text == "Ray's controller of the workers was killed by a signal or crashed, and raised nothing"
    assert controller.again

    start = explain(ControllerError(ValueError("no such backend")))
    assert (start.text, start.again) == ("Ray could not run it: ValueError: no such backend", False)

    assert explain(WorkerGroupError("text", {0: KeyError("a")})).text == "a worker raised KeyError: 'a'"
    assert explain(WorkerGroupError("text", {0: collateral}), lines).text == f"a worker raised {lines[0].cause}"


def test_a_slot_less_is_less_for_good_and_the_last_stays() -> None:
    slots = Slots(6)
    one, other = slots.hold(2), slots.hold(2)
    assert one.fewer()  # Takes the third pair.
    assert not other.more()
    waiting = threading.Thread(target=other.fewer)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "until another gives its back"
    one.release()
    waiting.join(5)
    assert not waiting.is_alive()
    assert not other.fewer()
    other.release()
    with slots.hold(2) as last:
        assert not last.more()


@pytest.fixture
def train_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains with another worker."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (run, *_) = Params().runs()

    def train_with(worker: Worker, held: Held | None = None, **params: Any) -> None:
        monkeypatch.setattr(train, "worker", worker)
        train.train_on_workers(run, tmp_path, tmp_path, "hash", False, {}, ClusterParams(**params), held)

    return train_with


def reporting(work: Callable[[dict[str, Any], int], None]) -> Worker:
    """A worker that does this in place of training, and tells what it raises as the real one does."""

    def worker(config: dict[str, Any]) -> None:
        from pathlib import Path

        from ray.train import get_context

        from pipelines.jobs.failures import Raised

        rank = get_context().get_world_rank()
        try:
            work(config, rank)
        except Exception as error:
            Raised.of(error).write(Path(config["folder"]) / f"failure-{config['attempt']}-{rank}.json")
            raise

    return worker


@pytest.mark.slow
def test_training_that_fails_says_why(
    train_with: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    with cluster(ClusterParams(threads=1, busy="share")):

        def broken(config: dict[str, Any], rank: int) -> None:
            raise RuntimeError("expected all tensors\non one device, found '\n\"\n")

        with pytest.raises(UserError) as caught:
            train_with(reporting(broken), max_failures=0)
        assert str(caught.value) == (
            "training: a worker raised RuntimeError: expected all tensors on one device, found ' \" (more in"
            f" {tmp_path / ERRORS}); this was failure 1, and cluster.max_failures is 0; run the same command again to"
            " go on from the newest checkpoint."
        )
        assert (tmp_path / ERRORS).read_text().count("in broken") == 1

        def mistaken(config: dict[str, Any], rank: int) -> None:
            from dvdp.errors import UserError

            if rank == 0:
                time.sleep(100)
            raise UserError("store: found image 3 damaged, expected it whole; prepare it again.")

        with pytest.raises(UserError, match=r"^store: found image 3 damaged, expected it whole; prepare it again\.$"):
            train_with(reporting(mistaken), num_workers=2)

        def bereaved(config: dict[str, Any], rank: int) -> None:
            from pathlib import Path

            tries = Path(config["folder"]) / "tries"
            tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
            if len(tries.read_text()) == 1:
                for process in psutil.process_iter():
                    if (
                        "TrainController" in " ".join(process.cmdline())
                        and process.parent() == psutil.Process().parent()
                    ):
                        process.kill()
                time.sleep(100)
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(UserError) as caught:
            train_with(reporting(bereaved), max_failures=1)
        assert (tmp_path / "tries").read_text() == "xx", "the controller was killed, then the worker"
        assert str(caught.value).startswith(
            "training: a worker was killed by a signal or crashed, and raised nothing (more in"
        )
        assert "this was failure 2, and cluster.max_failures is 1" in str(caught.value)

        with pytest.raises(UserError) as caught:
            train_with(reporting(broken), num_workers=500)
        assert str(caught.value).startswith("training: Ray could not run it: ")
        assert "max_failures" not in str(caught.value)


@pytest.mark.slow
def test_without_memory_there_is_one_run_fewer_at_a_time_and_then_a_sentence(
    train_with: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")  # There is never enough.
    monkeypatch.setattr(train, "PAUSE", 0)

    def work(config: dict[str, Any], rank: int) -> None:
        time.sleep(100)

    with cluster(ClusterParams(threads=1, busy="share")) as slots:
        held = slots.hold(1)
        with pytest.raises(UserError) as caught:
            train_with(reporting(work), held, max_failures=1)
        assert str(caught.value).startswith(
            "training: Ray ended it, as this machine or its container was running out of memory (more in"
        )
        assert "this was failure 2" in str(caught.value)
        assert not held.more(), "one is left, which is held"

        with pytest.raises(UserError, match=r"^cluster: Ray ended it, as this machine"):
            on_worker(ClusterParams(threads=1, storage=tmp_path), time.sleep, 100)
