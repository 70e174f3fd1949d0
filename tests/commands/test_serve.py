"""The page draws what it is asked for from a registered model, and says in one sentence what it cannot."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import uvicorn
from PIL import Image

from dvdp.config import Params
from dvdp.errors import UserError
from dvdp.models.export import load_model
from pipelines.commands.serve import pages, serve
from pipelines.tracking.registry import register
from pipelines.tracking.runs import TRAINING_HASH, open_run
from tests.tracking.support import empty_store, free_port, small_model

#: Without these Chromium asks the network, and a page waits for it.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a page, and the weights that it draws from."""
    folder = tmp_path_factory.mktemp("served")
    weights = small_model(folder / "weights.safetensors", labels=["cat", "<dog>"])
    run = open_run(empty_store(folder), "digits", TRAINING_HASH, "x", "x")
    register(run, "dvdp-digits", weights, {TRAINING_HASH: "x"})
    (path,) = folder.glob("mlartifacts/models/*/artifacts")
    port = free_port()
    app = pages(mlflow.pyfunc.load_model(str(path)), "models:/dvdp-digits@champion")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}", weights
    server.should_exit = True
    thread.join()


def asked(address: str, request: dict[str, Any]) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body, kind = json.dumps(request).encode(), {"Content-Type": "application/json"}
    with opener.open(urllib.request.Request(f"{address}/draw", body, kind), timeout=60) as answer:
        return json.load(answer)


def pixels(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def test_it_answers_with_images_and_what_draws_them_again(served: tuple[str, Path]) -> None:
    address, weights = served
    drawn = asked(address, {"count": 2, "label": "<dog>", "seed": 5, "steps": 3})
    expected = load_model(weights).sample(2, seed=5, label="<dog>", steps=3).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal([pixels(row["image"]) for row in drawn], expected)
    assert [(row["seed"], row["index"], row["label"]) for row in drawn] == [(5, 0, "<dog>"), (5, 1, "<dog>")]


def test_what_cannot_be_drawn_is_one_sentence(served: tuple[str, Path]) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        asked(served[0], {"count": 1, "label": "cow"})
    assert json.load(error.value) == {"message": "label: found 'cow', expected one of cat, <dog>."}


@pytest.mark.parametrize("stranger", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_strangers_are_refused(served: tuple[str, Path], stranger: dict[str, str]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as error:
        opener.open(urllib.request.Request(f"{served[0]}/", headers=stranger), timeout=60)
    assert error.value.code == 403


def test_a_browser_shows_the_images_that_an_address_asks_for(served: tuple[str, Path], tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    address, weights = served

    def shown(query: str) -> str:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={tmp_path}"]
        command += ["--virtual-time-budget=20000", "--dump-dom", f"{address}/?{query}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    page = shown("count=3&label=cat&seed=7&steps=3")
    images = [pixels(image) for image in re.findall(r"src=\"data:image/png;base64,([^\"]+)", page)]
    expected = load_model(weights).sample(3, seed=7, label="cat", steps=3).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images, expected)
    assert re.search(r"3 images of seed 7, in \d+\.\d s", page)
    assert "<option>&lt;dog&gt;</option>" in page
    assert "steps: found 1, expected at least" in unescape(shown("count=1&steps=1"))


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_store(tmp_path).tracking_uri)
    with pytest.raises(
        UserError, match=r"^--model: found no version 'models:/dvdp-digits@champion' in MLflow, expected"
    ):
        serve(Params(), None, 1)
    with pytest.raises(UserError, match=r"^--model: found 'champion', expected models:/<name>@<alias> or"):
        serve(Params(), "champion", 1)
