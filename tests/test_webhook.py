"""Whoever asked to be told how flow runs end is told, and no flow run suffers from it."""

from __future__ import annotations

import json
import time
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Failed

from pipelines import webhook
from pipelines.webhook import tell
from tests.logs import hearing
from tests.tracking.support import free_port
from tests.webhooks import listening

RUN = FlowRun(flow_id=uuid4(), name="digits at 0123abcd")


def test_a_failure_is_told_as_json_with_one_line_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as (address, told), temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        monkeypatch.setenv("DVDP_WEBHOOK", address)
        tell("experiment", RUN, Failed(message="ddpm failed: 'no memory' ★"))
    ((kind, body),) = told
    assert kind == "application/json"
    assert json.loads(body) == {
        "text": "experiment 'digits at 0123abcd': Failed. ddpm failed: 'no memory' ★",
        "flow": "experiment",
        "flow_run": "digits at 0123abcd",
        "id": str(RUN.id),
        "state": "FAILED",
        "message": "ddpm failed: 'no memory' ★",
        "url": f"http://127.0.0.1:4200/runs/flow-run/{RUN.id}",
    }


def test_a_webhook_that_does_not_work_is_a_warning_without_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with hearing(lines.append), listening(404) as (refusing, _):
        for address in (
            refusing,
            f"http://127.0.0.1:{free_port()}/secret",
            "secret",
            "file:///secret",
            "http://[secret",
        ):
            monkeypatch.setenv("DVDP_WEBHOOK", address)
            tell("experiment", RUN, Crashed(message="killed"))
    assert len(lines) == 5
    assert lines[0].startswith("DVDP_WEBHOOK: found status 404, expected an address that takes JSON")
    assert not [line for line in lines if "secret" in line]


def test_a_webhook_that_hangs_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "LIMIT", 0.5)
    lines: list[str] = []
    with hearing(lines.append), listening(seconds=3) as (address, told):
        monkeypatch.setenv("DVDP_WEBHOOK", address)
        began = time.monotonic()
        tell("experiment", RUN, Failed())
        assert time.monotonic() - began < 1.5
    assert len(told) == 1
    assert lines[0].startswith("DVDP_WEBHOOK: found no answer within")


def test_without_an_address_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVDP_WEBHOOK", raising=False)
    tell("experiment", RUN, Failed())
