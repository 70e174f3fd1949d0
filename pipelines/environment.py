"""What the environment says of this machine, before a server or a library that reads it starts."""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import os
import socket
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

from dvdp.errors import UserError
from pipelines.addresses import PREFECT_SECRET, public

#: Variables with the address of a server.
ADDRESSES = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")
#: What no proxy can reach for us.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def reach_loopback_directly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Exempt loopback from the proxies that the environment names; other addresses follow it as before.

    Prefect (httpx, websockets), MLflow (requests) and urllib obey ``no_proxy`` and ``NO_PROXY``, and so do the
    processes that this one starts. Ray uses no proxy. Called first of all by whatever may talk to a server.
    """
    direct = dict.fromkeys([*LOOPBACK, *filter(_is_loopback, (_host(environment.get(name, "")) for name in ADDRESSES))])
    given = {name: environment[name] for name in ("no_proxy", "NO_PROXY") if name in environment}
    for name in ("no_proxy", "NO_PROXY"):
        # httpx fails at the brackets of an IPv6 address.
        hosts = [host.strip().strip("[]") for host in given.get(name, next(iter(given.values()), "")).split(",")]
        # All but httpx want an asterisk, for all addresses, alone.
        environment[name] = "*" if "*" in hosts else ",".join(dict.fromkeys([*filter(None, hosts), *direct]))


def _host(address: str) -> str:
    """The host of an address, or the empty string."""
    with contextlib.suppress(ValueError):
        return urlsplit(address).hostname or ""
    return ""


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(host) and any(ipaddress.ip_address(a[4][0]).is_loopback for a in socket.getaddrinfo(host, None))
    return False


def open_standard_streams() -> None:
    """Lead those of stdin, stdout and stderr that are closed to nowhere.

    Else the next file that is opened takes their number, and whatever a child process prints is written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest number that is free, this one.
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def check_folder() -> None:
    """Raise UserError if the current folder is gone."""
    try:
        Path.cwd()
    except OSError as error:
        raise UserError(
            f"the current folder: found that it cannot be entered ({error.strerror}), expected the project's; go there"
            " again with cd."
        ) from None


def find_home() -> None:
    """Name a folder of the project as home, and the user by number, where the system knows neither."""
    home = Path(".services/home").resolve()
    with contextlib.suppress(RuntimeError):
        home = Path.home() if Path.home().is_dir() else home
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(home)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"


def temporary_folder(longest: int) -> Path:
    """A folder for temporary files that can be written: the environment's, or the system's where that is of no use.

    Args:
        longest: of its path, in bytes; those of sockets in it have a limit of 107.

    Raises:
        UserError: none can be written.
    """
    named = [os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR")]
    problems = []
    for folder in dict.fromkeys([*filter(None, named), "/tmp", "/var/tmp", "/dev/shm"]):
        if len(os.fsencode(Path(folder).absolute())) > longest:
            problems.append(f"{folder}: its path is longer than {longest} bytes")
            continue
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))
            return Path(folder).absolute()
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
    raise UserError(
        f"TMPDIR: found no folder for temporary files that can be used ({'; '.join(problems)}), expected one with a"
        " short path and space; name it with TMPDIR."
    )


def check_prefect() -> None:
    """Raise UserError if Prefect's client cannot start, or ``PREFECT_API_URL`` is not a server that answers us."""
    import httpx

    try:
        client = httpx.Client(timeout=10, follow_redirects=True)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")
        found = ", ".join(f"{name}={public(value)}" for name, value in os.environ.items() if name.lower() in names)
        raise UserError(
            f"proxies and certificates: found {found}, which cannot be used ({error}), expected addresses such as"
            " http://proxy:3128 and files that exist; change or unset them."
        ) from None
    address = os.environ.get("PREFECT_API_URL", "")
    if not address:
        return
    problem, secret = "", os.environ.get(PREFECT_SECRET, "")
    name, _, password = secret.partition(":")
    refused = False
    with client:
        try:
            answer = client.get(f"{address.rstrip('/')}/health")
            # Prefect Cloud wants a key before it says anything.
            if answer.status_code not in (401, 403) and answer.text.strip() != "true":
                problem = f"status {answer.status_code}, and no word of Prefect's"
            elif "PREFECT_API_KEY" not in os.environ:
                version = client.get(f"{address.rstrip('/')}/admin/version", auth=(name, password) if secret else None)
                refused = version.status_code == 401
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            problem = f"{error or type(error).__name__}"
    if problem:
        raise UserError(
            f"PREFECT_API_URL: found no Prefect server that answers at '{public(address)}' ({problem}), expected one"
            " such as http://127.0.0.1:4200/api; start it, or unset the variable to use a temporary one."
        )
    if refused and not _in_profile():
        raise UserError(
            f"{PREFECT_SECRET}: found {'other' if secret else 'no'} words for Prefect's server at '{public(address)}',"
            " expected the name and password that it asks for; for `make services` unset PREFECT_API_URL, and dvdp"
            " finds both, or take them from `python -m infra.services env`."
        )


def _in_profile() -> bool:
    """Whether a profile of Prefect says how to authenticate."""
    from prefect.settings import load_current_profile

    return bool({PREFECT_SECRET, "PREFECT_API_KEY"} & {each.name for each in load_current_profile().settings})
