"""How many images does `mlflow models serve` answer with, and how long does a request wait?

    MLFLOW_TRACKING_URI=sqlite:///mlflow.db python -m benchmarks.serving models:/dvdp-digits@champion --out serving.json

Starts the server as docs/serving.md does and asks for images with so many clients at a time, each of which asks again
as soon as it is answered. In the end a request that cannot be drawn, and one that is answered twice with equal bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine
from dvdp.files import write_atomically


def main() -> None:
    """Serve, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="models:/<name>@<alias> or models:/<name>/<version>")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 16], help="images of a request")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    options = parser.parse_args()
    with served(options.model) as address:
        loads = [
            load(address, clients, {"count": count, "steps": options.steps}, options.seconds)
            for count in options.counts
            for clients in options.clients
        ]
        again = {ask(address, {"count": 2, "seed": 3, "steps": options.steps}).text for _ in range(2)}
        refused = ask(address, {"count": 1000})
    found = {
        "machine": machine(),
        "loads": loads,
        "refused": [refused.status_code, refused.json()["message"]],
        "same_answer_again": len(again) == 1,
    }
    write_atomically(options.out, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of a server of the model, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["models", "serve", "-m", model, "--env-manager", "local", "--port", str(port)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "mlflow", *command], env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                if httpx.get(f"{address}/ping", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def ask(address: str, request: dict[str, Any]) -> httpx.Response:
    """One request of one row."""
    return httpx.post(f"{address}/invocations", json={"dataframe_records": [request]}, timeout=600)


def load(address: str, clients: int, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What so many clients at a time are answered."""

    def client(_: int) -> list[tuple[float, int]]:
        found = []
        while time.monotonic() < until:
            asked = time.monotonic()
            status = ask(address, request).status_code
            found.append((time.monotonic() - asked, status))
        return found

    ask(address, request)
    begun = time.monotonic()
    until = begun + seconds
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(client, range(clients)) for answer in found]
    took = time.monotonic() - begun
    waits = sorted(wait for wait, _ in answers)
    return {
        "clients": clients,
        **request,
        "requests": len(answers),
        "failed": sum(status != 200 for _, status in answers),
        "images_per_second": len(answers) * request["count"] / took,
        "median_seconds": statistics.median(waits),
        "longest_seconds": waits[-1],
    }


if __name__ == "__main__":
    main()
