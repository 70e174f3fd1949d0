"""A server on loopback is for programs of this machine and for its own pages.

A browser on this machine reaches it too, with what any page sends: under the page's own name, where that leads to
loopback (``Host``), or from its scripts (``Origin``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost", "::1")


class LoopbackOnly:
    """Refuse requests under a foreign ``Host``, or with the ``Origin`` of another page, of HTTP and websockets."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        if scope["type"] in ("http", "websocket"):
            from starlette.datastructures import Headers
            from starlette.responses import PlainTextResponse

            headers = Headers(scope=scope)
            if not is_own(headers.getlist("host"), headers.getlist("origin")):
                await PlainTextResponse("foreign Host or Origin", 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_own(hosts: list[str], origins: list[str]) -> bool:
    """Whether a request names loopback as its host, and as its origin, if it has one, a page at the same port."""
    try:
        (host,) = [urlsplit(f"//{each}") for each in hosts]
        pages = [urlsplit(each) for each in origins]
        return host.hostname in HOSTS and all(
            page.scheme == "http" and page.hostname in HOSTS and (page.port or 80) == (host.port or 80)
            for page in pages
        )
    except ValueError:
        return False
