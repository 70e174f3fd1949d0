"""Work on the cluster takes what nobody else needs of it, and leaves the rest alone."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from itertools import product
from pathlib import Path

import psutil
import pytest

from dvdp.config import ClusterParams
from dvdp.errors import UserError
from pipelines.jobs.cluster import (
    AUTHENTICATION,
    check_address,
    check_storage,
    close_to_others,
    cluster,
    on_workers,
    private_folder,
)

#: Asks the GCS of a cluster for its nodes, as any client does first.
CALL = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)), "nodes")
"""


def at_once(spans: list[tuple[float, float]]) -> int:
    """The most that went on at any time."""
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


@pytest.mark.slow
def test_tasks_take_the_slots_that_are_left_and_give_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    params = ClusterParams(threads=1, busy="share")

    def work(seconds: float, _: int) -> tuple[float, float]:
        start = time.time()
        time.sleep(seconds)
        return start, time.time()

    with cluster(params) as slots:
        tasks = list(product([0.5], range(4)))
        list(on_workers(params, work, tasks, threading.Semaphore(1)))  # Two processes are up.
        assert at_once(list(on_workers(params, work, tasks, threading.Semaphore(0)))) == 1
        left = threading.Semaphore(1)
        assert at_once(list(on_workers(params, work, tasks, left))) == 2
        assert left.acquire(blocking=False), "given back"
        assert not left.acquire(blocking=False), "once"
        with slots:
            found = list(on_workers(params, work, tasks, slots))
        assert len(found) == len(tasks)

        def broken(_: int) -> None:
            raise ValueError("broken")

        left = threading.Semaphore(1)
        with pytest.raises(Exception, match="broken"):
            list(on_workers(params, broken, [(0,), (1,)], left))
        assert left.acquire(blocking=False), "given back after a failure too"


@pytest.mark.slow
def test_the_cluster_of_this_machine_is_closed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", *AUTHENTICATION):
        monkeypatch.delenv(name, raising=False)

    def work(_: int) -> None:
        time.sleep(0.1)

    with cluster(ClusterParams(threads=1, busy="share")) as room:
        import ray

        list(on_workers(ClusterParams(threads=1, busy="share"), work, [(0,), (1,)], room))
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

        said = [" ".join(process.cmdline()) for process in processes[1:]]
        logs = [path for path in Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1].rglob("*") if path.is_file()]
        assert logs
        assert not [text for text in [*said, *(path.read_text(errors="ignore") for path in logs)] if token in text]


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

    with cluster(ClusterParams(threads=1, busy="share")) as slots:
        (found,) = on_workers(ClusterParams(threads=1, busy="share"), work, [(0,)], slots)
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
