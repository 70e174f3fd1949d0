"""The team's services, as a command that may use them sees them: addresses, if they answer.

``infra/services.py`` starts them and writes what is read here; see there.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = ".services"
#: In the environment of a client of Prefect: the name and password that the server asks for.
PREFECT_SECRET = "PREFECT_API_AUTH_STRING"
#: Where `make ui` shows MLflow.
LOCAL_PAGE = "http://127.0.0.1:5000"
#: Paths that answer once a service is healthy, below the address that the variable holds.
HEALTH = {"MLFLOW_TRACKING_URI": "/health", "PREFECT_API_URL": "/health"}


def services_environment(project: Path | str = ".", timeout: float = 0.8) -> dict[str, str]:
    """``MLFLOW_TRACKING_URI`` and ``PREFECT_API_URL`` of the services of this project folder that answer now.

    With the latter comes :data:`PREFECT_SECRET`.

    Args:
        timeout: seconds to wait for them, in all.

    Returns:
        Variables to set; empty where no services are up.
    """
    known = read_environment(Path(project) / FOLDER / "env")
    addresses = {name: known[name] for name in HEALTH if name in known}
    with ThreadPoolExecutor(max_workers=len(HEALTH)) as pool:
        answers = pool.map(lambda name: healthy(addresses[name] + HEALTH[name], timeout), addresses)
        found = {name: addresses[name] for name, answer in zip(addresses, answers, strict=True) if answer}
    if "PREFECT_API_URL" in found and PREFECT_SECRET in known:
        found[PREFECT_SECRET] = known[PREFECT_SECRET]
    return found


def read_environment(file: Path) -> dict[str, str]:
    """The variables of a file of ``export NAME=value`` lines that we know; none where there is no file."""
    if not file.is_file():
        return {}
    pairs = (line.removeprefix("export ").split("=", 1) for line in file.read_text().splitlines() if "=" in line)
    return {name: value for name, value in pairs if name in (*HEALTH, PREFECT_SECRET)}


def healthy(address: str, timeout: float) -> bool:
    """Whether an address answers with success."""
    # Loopback is never behind a proxy, whatever the environment says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=timeout) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def mlflow_page(server: str, experiment: str = "", run: str = "") -> str:
    """The page of a run, of an experiment's runs, or of all experiments; within MLflow where ``server`` is empty.

    MLflow's own start page is about language models.
    """
    page = f"{public(server).rstrip('/')}/#/experiments" if server else "#/experiments"
    return page + (f"/{experiment}/runs" + (f"/{run}" if run else "") if experiment else "")


def public(text: str) -> str:
    """Without the name and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", text)
