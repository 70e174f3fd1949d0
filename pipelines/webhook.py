"""A word to a webhook when a flow run fails, crashes or is cancelled: JSON to the address in ``DVDP_WEBHOOK``."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import State

logger = logging.getLogger("dvdp.webhook")

#: Seconds for all of it.
LIMIT = 5.0


def hook(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """For Prefect to call when a flow run ends."""
    if not (state.is_crashed() and _cancelled(flow_run)):
        tell(flow.name, flow_run, state)


#: Of every flow of ours.
HOOKS: Any = {"on_failure": [hook], "on_crashed": [hook], "on_cancellation": [hook]}


def tell(flow: str, flow_run: FlowRun, state: State[Any]) -> None:
    """Post which flow run ended how and why; whatever becomes of it, nothing is raised.

    ``text`` is one line for people, as chats show it; the other keys are for programs.
    """
    address = os.environ.get("DVDP_WEBHOOK")
    if not address:
        return
    from prefect.utilities.urls import url_for

    name, said = state.name or state.type.value, state.message or ""
    word = {
        "text": f"{flow} '{flow_run.name}': {name}. {said}".strip(),
        "flow": flow,
        "flow_run": flow_run.name,
        "id": str(flow_run.id),
        "state": state.type.value,
        "message": said,
        "url": url_for("flow-run", obj_id=flow_run.id),
    }
    problems: list[str] = []
    # A name that is looked up, or an answer that trickles in, would outlast the limits of any client.
    thread = threading.Thread(target=_post, args=(address, word, problems), name="webhook", daemon=True)
    thread.start()
    thread.join(LIMIT)
    if thread.is_alive():
        problems = [f"no answer within {LIMIT:g} s"]
    if problems:
        logger.warning("DVDP_WEBHOOK: found %s, expected an address that takes JSON; nobody was told", problems[0])


def _cancelled(flow_run: FlowRun) -> bool:
    """Whether somebody has cancelled a run: its end is no crash, and they are told of it already."""
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
    except Exception:  # Whatever the server says, a crash is told.
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def _post(address: str, word: dict[str, Any], problems: list[str]) -> None:
    import httpx

    try:
        httpx.post(address, json=word, timeout=LIMIT).raise_for_status()
    except httpx.HTTPStatusError as error:
        problems.append(f"status {error.response.status_code}")
    except Exception as error:  # Addresses of webhooks are secrets: what httpx says of one is not shown.
        problems.append(type(error).__name__)
