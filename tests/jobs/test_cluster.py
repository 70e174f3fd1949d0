"""Work on the cluster takes what nobody else needs of it, and leaves the rest alone."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import ipaddress
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from tqdm import tqdm

from dvdp.config import ClusterParams
from dvdp.errors import UserError
from pipelines.jobs.cluster import (
    AUTHENTICATION,
    Slots,
    Work,
    check_address,
    check_storage,
    close_to_others,
    cluster,
    on_worker,
    on_workers,
    private_folder,
)
from tests.e2e.support import wait_until

#: Asks the GCS of a cluster for its nodes, as any client does first.
CALL = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)), "nodes")
"""


def at_once(spans: list[tuple[float, float]]) -> int:
    """The most that went on at any time."""
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


def begins(work: Callable[..., Any]) -> Callable[[], Work]:
    """A worker's start, for work that leaves nothing to its end."""

    def start() -> Work:
        def begin(*arguments: Any) -> Callable[[], Any]:
            result = work(*arguments)
            return lambda: result

        return begin

    return start


@pytest.mark.slow
def test_workers_take_the_slots_that_are_left_and_give_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    params = ClusterParams(threads=1, busy="share")

    def work(seconds: float, _: int) -> tuple[float, float]:
        start = time.time()
        time.sleep(seconds)
        return start, time.time()

    def broken(_: int) -> None:
        raise ValueError("broken")

    with cluster(params):
        tasks = list(product([0.5], range(20)))
        slots = Slots(1)
        with slots.hold(1) as held:
            assert at_once(list(on_workers(params, begins(work), tasks[:3], held))) == 1
        slots = Slots(2)
        with slots.hold(1) as held:
            assert at_once(list(on_workers(params, begins(work), tasks, held))) == 2
            assert (held.number, held.more(), held.more()) == (1, True, False), "given back, once"
        with slots.hold(1) as held, pytest.raises(UserError, match="a worker raised ValueError: broken"):
            list(on_workers(params, begins(broken), [(0,), (1,)], held))
        assert slots.hold(2).number == 2, "given back after a failure too"


def test_a_run_waits_for_all_of_its_slots_and_nobody_takes_them_from_under_it() -> None:
    slots = Slots(3)
    first, sampling = slots.hold(2), slots.hold(0)
    waiting = threading.Thread(target=slots.hold, args=(2,))
    waiting.start()
    while not slots._waiting:
        time.sleep(0.001)
    assert not sampling.more(), "the third is free, and a run waits"
    first.keep(1)
    waiting.join(5)
    assert not waiting.is_alive(), "it begins while the first is scored"
    assert not sampling.more()
    first.release()
    assert sampling.more()
    first.release()
    assert not sampling.more(), "given back once"


class Counting:
    """Work that says who begins and ends it, and when."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / f"start-{os.getpid()}").touch()

    def __call__(self, piece: int) -> Callable[[], Told]:
        begun = time.time()
        time.sleep(0.2)

        def end() -> Told:
            time.sleep(0.1)
            with (self.folder / f"done-{piece}").open("a") as file:
                file.write("x")
            return Told(piece, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), begun, time.time())

        return end


class Told(NamedTuple):
    piece: int
    process: int
    gpu: str
    begun: float
    ended: float


@pytest.mark.slow
def test_a_gpu_has_one_process_for_all_pieces_and_begins_one_while_another_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')
    params = ClusterParams(threads=1, gpu=True, num_workers=2, busy="share", storage=tmp_path)
    with cluster(params) as slots, slots.hold(2) as held:
        import ray

        assert not held.more(), "as many slots as GPUs"
        found = list(on_workers(params, partial(Counting, tmp_path), [(i,) for i in range(40)], held))
        assert sorted(each.piece for each in found) == list(range(40))
        of_gpus = {(each.process, each.gpu) for each in found}
        assert sorted(gpu for _, gpu in of_gpus) == ["0", "1"]
        assert len(list(tmp_path.glob("start-*"))) == 2
        for process, _ in of_gpus:
            mine = sorted(each for each in found if each.process == process)
            beside = [after.begun < before.ended for before, after in pairwise(mine)]
            assert sum(beside) >= len(beside) - 2, "all but the last"
        wait_until(lambda: ray.available_resources().get("GPU") == 2)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again_and_what_was_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    params = ClusterParams(threads=1, num_workers=2, busy="share", storage=tmp_path, max_failures=1)

    def kill_one(after: int) -> list[Told]:
        """Do 20 pieces; once so many are done, kill who did the last."""
        found = []
        for told in on_workers(params, partial(Counting, tmp_path), [(i,) for i in range(20)], held):
            found.append(told)
            if len(found) == after:
                os.kill(told.process, signal.SIGKILL)
        return found

    with cluster(params) as slots, slots.hold(2) as held:
        found = kill_one(5)
        assert sorted(each.piece for each in found) == list(range(20))
        assert len(list(tmp_path.glob("start-*"))) == 3
        # What had been told is not done again; of what had not, one piece may have been about to be.
        assert sum(len(path.read_text()) - 1 for path in tmp_path.glob("done-*")) <= 1
        params = dataclasses.replace(params, max_failures=0)
        with pytest.raises(UserError) as caught:
            kill_one(5)
        assert str(caught.value) == (
            "cluster: a worker was killed by a signal or crashed, and raised nothing; what is finished is kept, run the"
            " same command again."
        )


@pytest.mark.slow
def test_the_bar_of_a_worker_is_shown_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def work(count: int) -> int:
        with tqdm(total=count, desc="score small", unit="image", disable=None, mininterval=0) as bar:
            for _ in range(count):
                time.sleep(0.2)
                bar.update()
        return count

    params, terminal = ClusterParams(threads=1, busy="share"), Terminal()
    with cluster(params):
        monkeypatch.setattr("sys.stderr", terminal)
        assert on_worker(params, work, 10) == 10
    assert re.search(r"score small: +\d0%.*[1-9]/10 \[.*image/s", terminal.getvalue())


@pytest.mark.slow
def test_the_cluster_of_this_machine_is_closed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", *AUTHENTICATION):
        monkeypatch.delenv(name, raising=False)

    def work(_: int) -> None:
        time.sleep(0.1)

    with cluster(ClusterParams(threads=1, busy="share")) as room:
        import ray

        pieces = on_workers(
            ClusterParams(threads=1, busy="share"), begins(work), [(i,) for i in range(999)], room.hold(1)
        )
        next(pieces)  # Workers are up, and stay so as long as there are more.
        mine = psutil.Process()
        processes = [mine, *mine.children(recursive=True)]
        assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
        addresses = [each.laddr for process in processes for each in listening(process)]
        assert len(addresses) >= 6, "GCS, raylet, object manager, runtime environments, driver and a worker"
        assert [ip for ip, _ in addresses if not is_loopback(ip)] == []
        for ip, (_, port) in product(addresses_of_this_machine(), addresses):
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((ip, port), timeout=5).close()

        token = os.environ["RAY_AUTH_TOKEN"]
        gcs = ray.get_runtime_context().gcs_address
        with_token, without, with_another = [
            subprocess.Popen([sys.executable, "-c", CALL, gcs], stdout=-1, stderr=-1, text=True, env=environment(auth))
            for auth in (
                {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
                {"RAY_AUTH_MODE": "disabled"},
                {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * len(token)},
            )
        ]
        assert with_token.communicate() == ("1 nodes\n", "")
        for process in (without, with_another):
            out, error = process.communicate()
            assert (process.returncode, out) == (1, "")
            assert "nauthenticated" in error

        said = []
        for process in processes[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends workers that it has no use for.
                said.append(" ".join(process.cmdline()))
        assert len(said) > 4
        pieces.close()
        logs = [path for path in Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1].rglob("*") if path.is_file()]
        assert logs
        assert not [text for text in [*said, *(path.read_text(errors="ignore") for path in logs)] if token in text]


@pytest.mark.slow
def test_ranks_exchange_gradients_without_listening_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", *AUTHENTICATION):
        monkeypatch.delenv(name, raising=False)

    def rank(config: dict[str, str]) -> None:
        import torch
        import torch.distributed as dist

        total = torch.tensor(1.0 + dist.get_rank())
        dist.all_reduce(total)
        found = [each.laddr.ip for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
        Path(config["out"], str(dist.get_rank())).write_text(json.dumps([total.item(), found]))
        dist.barrier()

    with cluster(ClusterParams(threads=1, num_workers=2, busy="share")):
        from ray.train import RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from pipelines.jobs.process_group import GroupConfig

        DataParallelTrainer(
            rank,
            train_loop_config={"out": str(tmp_path)},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="ranks", storage_path=str(tmp_path / "ray")),
            backend_config=GroupConfig(backend="gloo"),
        ).fit()
    for number in range(2):
        total, heard = json.loads((tmp_path / str(number)).read_text())
        assert total == 3
        assert len(heard) >= 2, "of Ray and gloo, and of rank 0 torch's store"
        assert all(map(is_loopback, heard))


def test_how_to_authenticate_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AUTHENTICATION:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    close_to_others()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", "http://127.0.0.1:80", "[::1", "127.0.0.1:9"]
)
def test_an_address_of_no_cluster_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"^RAY_ADDRESS: found nothing that answers at '") as caught:
        check_address()
    assert f"'{address}' (" in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_that_answers_is_taken_and_local_means_our_own(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    with socket.socket(family) as server:
        try:
            server.bind((host.strip("[]"), 0))
        except OSError:
            pytest.skip("no IPv6 here")
        server.listen()
        for scheme in ("", "ray://"):
            address = f"{scheme}{host}:{server.getsockname()[1]}"
            monkeypatch.setenv("RAY_ADDRESS", address)
            assert check_address() == address
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert check_address() == ""


def test_ray_gets_a_folder_of_its_own_where_its_usual_one_is_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="") as short:
        monkeypatch.setenv("TMPDIR", short)
        with private_folder() as folder:
            assert folder is None
        (Path(short) / "ray").write_text("of somebody else, so to say")
        (Path(short) / "ray").chmod(0)
        for useless in (short, str(tmp_path / "absent"), str(tmp_path / ("x" * 200))):
            monkeypatch.setenv("TMPDIR", useless)
            with private_folder() as folder:
                assert folder is not None
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
                assert len(str(folder / "session_2026-11-30_10-33-00_123456_1234567/sockets/plasma_store")) <= 107
            assert not folder.exists()


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "a\0b", "/proc/runs"])
def test_a_storage_that_is_no_folder_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_storage(tmp_path / "runs")
    with pytest.raises(
        UserError, match=r"^cluster.storage: found '.*', where nothing can be written \(.*\), expected a"
    ):
        check_storage(tmp_path / name)
    with pytest.raises(UserError, match=r"^cluster.storage: found 's3:/bucket', where nothing can be written"):
        check_storage(Path("s3://bucket"))


@pytest.mark.slow
def test_a_cluster_starts_below_a_folder_whose_path_is_too_long_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / ("x" * 200)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 200)))

    def work(_: int) -> str:
        return tempfile.gettempdir()

    with cluster(ClusterParams(threads=1, busy="share")):
        found = on_worker(ClusterParams(threads=1, busy="share"), work, 0)
        assert found.startswith("/tmp/dvdp-")
    assert not Path(found).exists()


def listening(process: psutil.Process) -> list[psutil._common.pconn]:
    try:
        return [each for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def addresses_of_this_machine() -> list[str]:
    """But those of loopback."""
    found = [
        each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family == socket.AF_INET
    ]
    return [ip for ip in found if not is_loopback(ip)]


def environment(changes: dict[str, str]) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name not in AUTHENTICATION}, **changes}
