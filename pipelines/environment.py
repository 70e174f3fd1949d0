"""What the environment says of this machine, before a server or a library that reads it starts."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import MutableMapping
from urllib.parse import urlsplit

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
