"""What the environment says is understood, or refused in one sentence, before anything starts."""

from __future__ import annotations

import base64
import http.server
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import requests
from websockets.proxy import get_proxy
from websockets.uri import parse_uri

from dvdp.errors import UserError
from pipelines.environment import check_prefect, find_home, reach_loopback_directly, temporary_folder

PROJECT = Path(__file__).parents[1]
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
DEAD = "http://127.0.0.1:9"


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without proxies and addresses, which is restored."""
    for name in (*PROXIES, *map(str.lower, PROXIES), "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "")  # Else what a test adds would stay.
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of an HTTP server on loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in request.param else socket.AF_INET

    try:
        server = Server((request.param, 0), Handler)
    except OSError:
        pytest.skip("no IPv6 here")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    host = f"[{request.param}]" if ":" in request.param else request.param
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"NO_PROXY": "*"},
        {"NO_PROXY": "localhost, *"},
        {"NO_PROXY": "example.com, .corp.example"},
        {"no_proxy": ""},
        {"no_proxy": "10.0.0.0/8", "NO_PROXY": "[::1]"},
    ],
)
def test_a_server_on_loopback_answers_behind_a_dead_proxy(
    server: str, given: Mapping[str, str], upper: bool, setenv: pytest.MonkeyPatch
) -> None:
    for name in PROXIES[:3]:
        setenv.setenv(name if upper else name.lower(), DEAD)
    for name, value in given.items():
        setenv.setenv(name, value)
    reach_loopback_directly()
    assert httpx.get(server).status_code == 200
    assert requests.get(server).status_code == 200
    assert get_proxy(parse_uri(server.replace("http", "ws"))) is None
    if "[" not in server:
        with urllib.request.urlopen(server) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "LOCALHOST", "[::1]"])
def test_named_addresses_on_loopback_are_reached_directly(name: str, host: str, setenv: pytest.MonkeyPatch) -> None:
    address = f"http://{host}:5000/api"
    setenv.setenv("HTTP_PROXY", DEAD)
    setenv.setenv(name, address)
    reach_loopback_directly()
    assert requests.utils.should_bypass_proxies(address, None)
    assert proxy_of(address) is None


def test_other_addresses_follow_the_environment(setenv: pytest.MonkeyPatch) -> None:
    setenv.setenv("HTTP_PROXY", DEAD)
    setenv.setenv("NO_PROXY", "direct.example")
    setenv.setenv("MLFLOW_TRACKING_URI", "http://192.0.2.1:5000")
    reach_loopback_directly()
    for address in ("http://far.example", "http://192.0.2.1:5000", "http://notlocalhost", "http://[2001:db8::1]"):
        assert not requests.utils.should_bypass_proxies(address, None)
        assert proxy_of(address) == DEAD
    assert requests.utils.should_bypass_proxies("http://direct.example", None)
    assert proxy_of("http://direct.example") is None


def test_what_was_given_stays_and_a_second_call_changes_nothing() -> None:
    environment = {"no_proxy": "a.example,localhost", "NO_PROXY": "b.example", "MLFLOW_TRACKING_URI": "http://[bad"}
    reach_loopback_directly(environment)
    assert environment["no_proxy"] == "a.example,localhost,127.0.0.1,::1"
    assert environment["NO_PROXY"] == "b.example,localhost,127.0.0.1,::1"
    again = dict(environment)
    reach_loopback_directly(again)
    assert again == environment
    everything = {"NO_PROXY": "*"}
    reach_loopback_directly(everything)
    assert everything == {"no_proxy": "*", "NO_PROXY": "*"}


def proxy_of(address: str) -> str | None:
    """That httpx uses for an address."""
    with httpx.Client() as client:
        transport = client._transport_for_url(httpx.URL(address))
    pool = transport._pool  # type: ignore[attr-defined]
    url = getattr(pool, "_proxy_url", None)
    return f"{url.scheme.decode()}://{url.host.decode()}:{url.port}" if url else None


def test_a_temporary_folder_can_be_written_and_has_a_short_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_folder(107) == tmp_path
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / ("x" * 200), tmp_path / "absent", tmp_path / "file", Path("/proc"), Path("/dev/full")):
        monkeypatch.setenv("TMPDIR", str(bad))
        assert temporary_folder(40) == Path("/tmp")
    (tmp_path / ("x" * 200)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 200)))
    assert temporary_folder(40) == Path("/tmp")
    monkeypatch.setenv("TMPDIR", "/absent")
    with pytest.raises(
        UserError, match=r"^TMPDIR: found no folder for temporary files that can be used \(/absent: its path is longer"
    ):
        temporary_folder(3)


REDIRECTED = """
import os, subprocess, sys
from pipelines.environment import open_standard_streams

open_standard_streams()
with open("file", "w") as file:
    print("lost")
    print("lost", file=sys.stderr)
    subprocess.run(["echo", "lost"])
    file.write("kept")
"""


@pytest.mark.parametrize("closed", ["", ">&-", "<&- >&- 2>&-"])
def test_what_is_printed_to_closed_streams_goes_into_no_file(closed: str, tmp_path: Path) -> None:
    subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, REDIRECTED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "file").read_text() == "kept"


def test_a_current_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    script = f'mkdir "{gone}"; cd "{gone}"; rmdir "{gone}"; exec "$0" -m pipelines.cli check'
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(["sh", "-c", script, sys.executable], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "dvdp: the current folder: found that it cannot be entered (No such file or directory), expected the"
        " project's; go there again with cd.\n"
    )


def test_who_has_no_home_gets_one_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    find_home()
    assert Path.home() == tmp_path
    for home in ("/absent", "/etc/passwd"):
        monkeypatch.setenv("HOME", home)
        find_home()
        assert Path.home() == tmp_path / ".services" / "home"
        assert Path.home().is_dir()


@pytest.mark.parametrize("server", ["127.0.0.1"], indirect=True)
def test_an_address_of_no_prefect_server_is_one_sentence(server: str, setenv: pytest.MonkeyPatch) -> None:
    check_prefect()
    for address in (
        server,
        "http://127.0.0.1:9/api",
        "http://user:secret@127.0.0.1:9",
        "127.0.0.1:4200",
        "http://[",
        "http://a:b",
    ):
        setenv.setenv("PREFECT_API_URL", address)
        with pytest.raises(UserError, match=r"^PREFECT_API_URL: found no Prefect server that answers at '") as caught:
            check_prefect()
        assert "secret" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("all_proxy", "socks://127.0.0.1:9"),
        ("HTTP_PROXY", "http://me:secret@proxy:port"),
        ("SSL_CERT_FILE", "/absent"),
    ],
)
def test_proxies_and_certificates_that_cannot_be_used_are_one_sentence(
    name: str, value: str, setenv: pytest.MonkeyPatch
) -> None:
    setenv.setenv(name, value)
    with pytest.raises(UserError, match=f"^proxies and certificates: found .*{name}=") as caught:
        check_prefect()
    assert "secret" not in str(caught.value)


def test_a_prefect_server_that_does_not_know_us_is_one_sentence(setenv: pytest.MonkeyPatch) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Authorization"] == f"Basic {base64.b64encode(b'dvdp:secret').decode()}"
            self.send_response(200 if known or self.path == "/api/health" else 401)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        setenv.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
        for given, found in (("", "no"), ("dvdp:guess", "other")):
            setenv.setenv("PREFECT_API_AUTH_STRING", given)
            with pytest.raises(UserError, match=rf"^PREFECT_API_AUTH_STRING: found {found} words for ") as caught:
                check_prefect()
            assert "guess" not in str(caught.value)
        setenv.setenv("PREFECT_API_AUTH_STRING", "dvdp:secret")
        check_prefect()
    finally:
        server.shutdown()
        server.server_close()


def test_a_socks_proxy_is_no_obstacle(setenv: pytest.MonkeyPatch) -> None:
    setenv.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    check_prefect()
