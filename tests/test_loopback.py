"""Servers on loopback answer programs of this machine and their own pages, and no others."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient, WebSocketDenialResponse

from pipelines.loopback import LoopbackOnly, is_own

PORT = "127.0.0.1:4200"


@pytest.mark.parametrize(
    ("hosts", "origins", "own"),
    [
        ([PORT], [], True),
        (["localhost:4200"], [], True),
        (["[::1]:4200"], [], True),
        (["LOCALHOST:4200"], ["http://127.0.0.1:4200"], True),
        (["127.0.0.1"], ["http://localhost"], True),
        (["evil.example:4200"], [], False),
        (["127.0.0.1.evil.example"], [], False),
        (["127.0.0.1@evil.example"], [], False),
        (["evil.example@127.0.0.1"], ["http://evil.example"], False),
        ([], [], False),
        ([PORT, "evil.example"], [], False),
        (["127.0.0.1:x"], ["http://127.0.0.1:4200"], False),
        ([PORT], ["http://evil.example"], False),
        ([PORT], ["http://evil.example:4200"], False),
        ([PORT], ["http://127.0.0.1:8080"], False),
        ([PORT], ["https://127.0.0.1:4200"], False),
        ([PORT], ["null"], False),
        ([PORT], [""], False),
        ([PORT], ["http://127.0.0.1:4200", "http://evil.example"], False),
    ],
)
def test_pages_of_the_same_port_of_loopback_are_its_own(hosts: list[str], origins: list[str], own: bool) -> None:
    assert is_own(hosts, origins) is own


def test_http_and_websockets_of_strangers_are_refused() -> None:
    app = FastAPI()
    app.get("/")(lambda: "reached")
    app.add_middleware(LoopbackOnly)
    with TestClient(app, base_url=f"http://{PORT}") as client:
        assert client.get("/").json() == "reached"
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            answer = client.get("/", headers=headers)
            assert (answer.status_code, answer.text) == (403, "foreign Host or Origin")
            with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/", headers=headers):
                pass
            assert refused.value.status_code == 403
