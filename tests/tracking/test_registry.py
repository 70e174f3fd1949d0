"""A registered model runs anywhere, leads back to where it comes from, and is champion for a reason."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from mlflow import MlflowClient
from PIL import Image

from dvdp.errors import UserError
from dvdp.evaluation.figures import grid
from dvdp.evaluation.records import ScoreRecord
from dvdp.models.export import load_model, save_model
from dvdp.models.given import given
from pipelines.addresses import healthy
from pipelines.cli import main
from pipelines.tracking.champion import CHAMPION, promote_best
from pipelines.tracking.connection import connect
from pipelines.tracking.registry import register, requirements
from pipelines.tracking.runs import SEED, TRAINING_HASH, TrackedRun, open_run
from tests.tracking.support import (
    empty_store,
    free_port,
    kill,
    mlflow_server,
    no_check,
    record,
    small_model,
    wait_until,
)

PROJECT = Path(__file__).parents[2]
NAME = "dvdp-digits"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    client = empty_store(tmp_path)
    # mlflow.pyfunc.load_model looks there for models:/ addresses.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    return client


def registered(client: MlflowClient, tmp_path: Path, seed: int, score: ScoreRecord | None = None) -> int:
    """The version of a run of this seed, registered (again) with these scores."""
    run = open_run(client, "digits", TRAINING_HASH, f"hash{seed}", f"seed {seed}")
    weights = small_model(tmp_path / f"weights-{seed}.safetensors", seed)
    return int(register(run, NAME, weights, {TRAINING_HASH: f"hash{seed}", SEED: str(seed)}, score).version)


# --- registration


def test_registering_again_keeps_the_version_and_renews_its_scores(client: MlflowClient, tmp_path: Path) -> None:
    assert registered(client, tmp_path, 0, record(3.0)) == 1
    assert registered(client, tmp_path, 0, record(2.0, samples=1024)) == 1
    (version,) = client.search_model_versions(f"name = '{NAME}'")
    assert version.tags[TRAINING_HASH] == "hash0"
    assert version.tags[SEED] == "0"
    assert version.tags["dvdp.score"] == "fd_labels 2"
    assert ScoreRecord.from_json(version.tags["dvdp.score_record"]) == record(2.0, samples=1024)
    assert len(client.search_logged_models(["1"])) == 1
    # MLflow's pages lead from the run to the model and back.
    run = client.get_run(version.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [
        model.model_id for model in client.search_logged_models(["1"])
    ]


def test_other_weights_of_the_same_training_are_another_version(client: MlflowClient, tmp_path: Path) -> None:
    assert registered(client, tmp_path, 0) == 1
    run = open_run(client, "digits", TRAINING_HASH, "hash0", "seed 0")
    weights = small_model(tmp_path / "other.safetensors", seed=1)
    assert int(register(run, NAME, weights, {TRAINING_HASH: "hash0"}).version) == 2


def test_another_way_of_sampling_the_same_weights_is_another_version(client: MlflowClient, tmp_path: Path) -> None:
    assert registered(client, tmp_path, 0) == 1
    run = open_run(client, "digits", TRAINING_HASH, "hash0", "seed 0, otherwise")
    model = load_model(tmp_path / "weights-0.safetensors")
    other = replace(model.run, sampling=replace(model.run.sampling, steps=model.run.sampling.steps + 1))
    weights = tmp_path / "otherwise.safetensors"
    save_model(weights, model.denoiser.network.state_dict(), {**model.description, "run": other.describe()})
    assert int(register(run, NAME, weights, {TRAINING_HASH: "hash0"}).version) == 2


class CutShort(MlflowClient):
    """Goes unavailable in the middle of registering: the given method fails once."""

    fails = ""

    def _fail(self, name: str) -> None:
        if self.fails == name:
            self.fails = ""
            raise requests.ConnectionError(name)

    def log_model_artifacts(self, *arguments, **keywords):
        self._fail("upload")
        return super().log_model_artifacts(*arguments, **keywords)

    def create_model_version(self, *arguments, **keywords):
        self._fail("version")
        return super().create_model_version(*arguments, **keywords)


@pytest.mark.parametrize("fails", ["upload", "version"])
def test_a_registration_cut_short_is_completed(client: MlflowClient, tmp_path: Path, fails: str) -> None:
    flaky = CutShort(client.tracking_uri)
    flaky.fails = fails
    with pytest.raises(requests.ConnectionError):
        registered(flaky, tmp_path, 0)
    assert registered(flaky, tmp_path, 0) == 1
    assert len(client.search_logged_models(["1"])) == 1
    assert predict(mlflow.pyfunc.load_model(f"models:/{NAME}/1"), {"count": 1}).shape == (1, 8, 8, 3)


def test_a_file_that_is_no_model_is_one_sentence_and_leaves_nothing(client: MlflowClient, tmp_path: Path) -> None:
    run = TrackedRun(client, *_run(client))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for weights in (tmp_path / "bad.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match=r"^model: "):
            register(run, NAME, weights, {TRAINING_HASH: "x"})
    assert not client.search_logged_models(["1"])


def _run(client: MlflowClient) -> tuple[str, str]:
    run = open_run(client, "digits", TRAINING_HASH, "x", "x")
    return run.run_id, run.experiment_id


def test_requirements_are_the_slim_core_and_mlflow_without_addresses() -> None:
    names = {line.split(">")[0].split("=")[0] for line in requirements()}
    assert names == {"filelock", "numpy", "pillow", "pydantic", "ruamel.yaml", "safetensors", "torch", "tqdm", "mlflow"}
    assert not any(mark in line for line in requirements() for mark in ("://", "@", "extra", "-"))


# --- what it answers


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> mlflow.pyfunc.PyFuncModel:
    folder = tmp_path_factory.mktemp("model")
    registered(empty_store(folder), folder, 0)
    (path,) = folder.glob("mlartifacts/models/*/artifacts")
    return mlflow.pyfunc.load_model(str(path))


def predict(model: mlflow.pyfunc.PyFuncModel, *rows: dict[str, object]) -> np.ndarray:
    return np.stack(model.predict(pd.DataFrame([{"format": "numbers", **row} for row in rows])).image)


def pixels(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))).astype(int)


def test_it_draws_the_images_of_the_trained_model(loaded: mlflow.pyfunc.PyFuncModel, tmp_path: Path) -> None:
    images = predict(loaded, {"count": 4, "seed": 0, "solver": "ddim", "steps": 10})
    expected = load_model(small_model(tmp_path / "m.safetensors")).sample(4, seed=0, solver="ddim", steps=10)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected.permute(0, 2, 3, 1).numpy())


def test_what_is_left_out_is_as_the_run_says(loaded: mlflow.pyfunc.PyFuncModel) -> None:
    short, full = {"count": 3, "seed": 3}, {"count": 3, "seed": 3, "solver": "ddpm", "steps": 4}
    np.testing.assert_array_equal(predict(loaded, short), predict(loaded, full))
    assert loaded.predict([short]).equals(loaded.predict(pd.DataFrame([full])))


def test_every_image_says_what_draws_it_again(loaded: mlflow.pyfunc.PyFuncModel) -> None:
    drawn, other = (loaded.predict(pd.DataFrame([{"count": 3}])) for _ in range(2))
    assert drawn.seed[0] != other.seed[0], "without a seed it is a random one"
    assert drawn["index"].tolist() == [0, 1, 2]
    same = loaded.predict(pd.DataFrame([{"count": 3, "seed": int(drawn.seed[0])}]))
    assert same.image.tolist() == drawn.image.tolist()
    alone = {"count": 1, "seed": int(drawn.seed[0]), "first": 2}
    (image,) = loaded.predict(pd.DataFrame([alone])).image
    np.testing.assert_array_equal(pixels(image), predict(loaded, alone)[0])
    # The kernels of another batch size may round another way.
    np.testing.assert_allclose(pixels(image), pixels(drawn.image[2]), atol=1)


def test_a_model_says_nothing_of_the_machine_that_made_it(tmp_path: Path) -> None:
    registered(empty_store(tmp_path), tmp_path, 0)
    (path,) = tmp_path.glob("mlartifacts/models/*/artifacts")
    texts = [file.read_bytes() for file in path.rglob("*") if file.is_file()]
    assert not [text for text in texts if os.fsencode(tmp_path) in text or os.fsencode(PROJECT) in text]


def test_rows_are_answered_one_after_the_other(loaded: mlflow.pyfunc.PyFuncModel) -> None:
    rows = [{"count": 2, "seed": 5, "solver": "ddpm"}, {"count": 1, "seed": 6, "solver": None}]
    apart = [predict(loaded, {"count": 2, "seed": 5}), predict(loaded, {"count": 1, "seed": 6})]
    np.testing.assert_array_equal(predict(loaded, *rows), np.concatenate(apart))


def test_a_class_conditional_model_draws_the_class_asked_for(tmp_path: Path) -> None:
    weights = small_model(tmp_path / "m.safetensors", labels=["0", "7"])
    run = open_run(empty_store(tmp_path), "digits", TRAINING_HASH, "told", "told")
    register(run, NAME, weights, {TRAINING_HASH: "told"})
    (path,) = tmp_path.glob("mlartifacts/models/*/artifacts")
    rows = [{"count": 2, "seed": 3, "label": label, "format": "numbers"} for label in ("7", None, "0")]
    drawn, model = mlflow.pyfunc.load_model(str(path)).predict(pd.DataFrame(rows)), load_model(weights)
    expected = [model.sample(2, seed=3, label=label).permute(0, 2, 3, 1).numpy() for label in ("7", None, "0")]
    np.testing.assert_array_equal(np.stack(drawn.image), np.concatenate(expected))
    labels = model.labels(3, 0, 2)
    assert labels is not None
    assert drawn.label.tolist() == ["7", "7", *(("0", "7")[label] for label in labels), "0", "0"]
    assert not np.array_equal(expected[0], expected[2])


def test_a_request_is_guided_as_it_says(tmp_path: Path) -> None:
    weights = small_model(tmp_path / "m.safetensors", labels=["0", "7"], label_dropout=0.1)
    run = open_run(empty_store(tmp_path), "digits", TRAINING_HASH, "guided", "guided")
    register(run, NAME, weights, {TRAINING_HASH: "guided"})
    (path,) = tmp_path.glob("mlartifacts/models/*/artifacts")
    loaded, model = mlflow.pyfunc.load_model(str(path)), load_model(weights)
    row = {"count": 2, "seed": 3, "label": "7"}
    for scale in (3, 2.5, [1.0, 3.0], None):
        expected = model.sample(2, seed=3, label="7", guidance=scale)
        found = predict(loaded, row if scale is None else {**row, "guidance": scale})
        np.testing.assert_array_equal(found, expected.permute(0, 2, 3, 1).numpy())
    by_http = loaded.predict([{**row, "guidance": [1.0, 3.0], "format": "numbers"}])
    np.testing.assert_array_equal(np.stack(by_http.image), predict(loaded, {**row, "guidance": [1.0, 3.0]}))
    with pytest.raises(Exception, match=r"^guidance: found 3 numbers, \[1.0, 2.0, 3.0\], expected one for each of 2"):
        predict(loaded, {**row, "guidance": [1.0, 2.0, 3.0]})
    with pytest.raises(Exception, match=r"^guidance: found 'high', expected a number or a list\.$"):
        predict(loaded, {**row, "guidance": "high"})


def coded(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_a_request_may_give_an_image(loaded: mlflow.pyfunc.PyFuncModel, tmp_path: Path) -> None:
    model = load_model(small_model(tmp_path / "m.safetensors"))
    random = np.random.default_rng(0)
    image, small = (coded(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in (8, 4))
    mask = coded(np.tri(8, dtype=np.uint8) * 255)
    requests: list[dict[str, Any]] = [
        {"image": image, "mask": mask, "resampling": 2},
        {"image": image, "strength": 0.4},
        {"image": small, "upscale": 2},
        {"image": image, "colourise": True},
        {},
    ]
    # All in one, where what a row leaves out is null.
    rows = [
        {"count": 2, "seed": 3}
        | {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in request.items()}
        for request in requests
    ]
    expected = [model.sample(2, seed=3, given=given(8, **r)).permute(0, 2, 3, 1).numpy() for r in requests]
    np.testing.assert_array_equal(predict(loaded, *rows), np.concatenate(expected))
    with pytest.raises(Exception, match=r"^image: found 'no base64!...', expected a picture in base64.$"):
        predict(loaded, {"count": 1, "image": "no base64!", "strength": 0.5})
    with pytest.raises(Exception, match=r"^mask: found 4 x 4 px, expected the size of the image, 8 x 8; resize it.$"):
        predict(loaded, {**rows[0], "mask": rows[2]["image"]})


def test_the_command_draws_from_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = small_model(tmp_path / "m.safetensors"), tmp_path / "out.png"
    random = np.random.default_rng(0)
    image, mask, small = (tmp_path / f"{name}.png" for name in ("image", "mask", "small"))
    image.write_bytes(coded(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)))
    small.write_bytes(coded(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)))
    mask.write_bytes(coded(np.tri(8, dtype=np.uint8) * 255))
    command, model = ["draw", str(weights), "--count", "2", "--seed", "3", "--out", str(out)], load_model(weights)
    requests: list[dict[str, Any]] = [
        {"image": image, "mask": mask},
        {"image": image, "mask": mask, "strength": 0.5, "resampling": 2},
        {"image": image, "strength": 0.4},
        {"image": small, "upscale": 2},
    ]
    for request in requests:
        assert main([*command, *(text for name, value in request.items() for text in (f"--{name}", str(value)))]) == 0
        expected = grid(model.sample(2, seed=3, given=given(8, **request)))
        np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    assert main([*command, "--image", str(image), "--colourise"]) == 0
    capsys.readouterr()
    assert main([*command, "--image", str(image), "--upscale", "4"]) == 0, "8 px are a multiple of 2"
    assert main([*command, "--image", str(small), "--strength", "0.5"]) == 2
    assert (
        "dvdp: image: found 4 x 4 px, expected 8 x 8 or a multiple of it; crop or resize it.\n"
        in capsys.readouterr().err
    )


def test_the_command_guides_by_one_scale_or_by_one_a_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = small_model(tmp_path / "m.safetensors", labels=["0", "7"], label_dropout=0.1), tmp_path / "g.png"
    command = ["draw", str(weights), "--count", "2", "--seed", "1", "--out", str(out)]
    for options, scale in ((["--guidance", "3"], 3.0), (["--guidance", "1", "--guidance", "4"], [1.0, 4.0])):
        assert main([*command, *options]) == 0
        expected = grid(load_model(weights).sample(2, seed=1, guidance=scale))
        np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    plain = small_model(tmp_path / "plain.safetensors", labels=["0", "7"])
    assert main(["draw", str(plain), "--guidance", "2", "--out", str(out)]) == 2
    assert (
        "dvdp: guidance: found 2.0 for a network that is trained without label_dropout, exp" in capsys.readouterr().err
    )


def test_the_command_draws_the_class_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = small_model(tmp_path / "m.safetensors", labels=["0", "7"]), tmp_path / "sevens.png"
    command = ["draw", str(weights), "--count", "4", "--out", str(out), "--label"]
    assert main([*command, "7"]) == 0
    expected = grid(load_model(weights).sample(4, label="7"))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    assert main([*command, "8"]) == 2
    assert "label: found '8', expected one of 0, 7." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"count": 0}, "^count: found 0, expected a number of images, at least 1.$"),
        ({"count": 1, "solver": "dim"}, r"^solver: found 'dim' \(did you mean 'ddim'\?\), expected one of"),
        ({"count": 1, "steps": 1}, "^steps: found 1, expected at least 2"),
        ({"count": 1, "steps": 0}, "^steps: found 0, expected at least 2"),
        ({"count": 1, "label": "7"}, "^label: found '7', expected none, as this model is unconditional"),
        ({"count": 200, "seed": 1}, "^count: found 400 images in a request, expected at most 256; ask for the others"),
        ({"count": 1, "format": "gif"}, "^format: found 'gif', expected one of png, numbers.$"),
        ({"count": 1, "first": -1}, "^first: found -1, expected the number of an image, at least 0.$"),
        ({"seed": 1}, "Model is missing inputs"),
    ],
)
def test_bad_input_is_one_sentence(loaded: mlflow.pyfunc.PyFuncModel, row: dict[str, object], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        loaded.predict(pd.DataFrame([row] * (1 + (row.get("count") == 200))))


def test_the_headline_is_the_frechet_distance_whatever_its_name() -> None:
    assert record(1.0).headline == "fd_labels"
    assert record(1.0, metrics={"precision": 1.0, "fid": 2.0}).headline == "fid"


# --- elsewhere


@pytest.mark.slow
def test_a_server_takes_the_model_and_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_store(tmp_path)
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with mlflow_server(tmp_path, port):
        client = connect(tmp_path)
        assert registered(client, tmp_path, 0, record(1.0)) == registered(client, tmp_path, 0, record(1.0)) == 1
        promote_best(client, NAME)
        model = mlflow.pyfunc.load_model(f"models:/{NAME}@{CHAMPION}")
    expected = load_model(tmp_path / "weights-0.safetensors").sample(2, seed=1)
    np.testing.assert_array_equal(predict(model, {"count": 2, "seed": 1}), expected.permute(0, 2, 3, 1).numpy())


PROGRAM = """
import importlib.util, json, sys
import pandas as pd
import mlflow
absent = ["dvdp", "pipelines", "ray", "prefect", "albumentations", "lmdb", "torch_fidelity", "dvc"]
assert not [name for name in absent if importlib.util.find_spec(name)], "the environment is not clean"
model = mlflow.pyfunc.load_model("models:/dvdp-digits@champion")
request = {"count": 4, "seed": 0, "solver": "ddpm", "steps": 250, "format": "numbers"}
images = [image.tolist() for image in model.predict(pd.DataFrame([request])).image]
print(json.dumps(images))
"""


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment with dvdp's slim core and mlflow, as pinned, and nothing of ours."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip(f"uv is not beside {sys.executable}")
    install = [str(uv), "pip", "install", "--quiet", "--python", str(folder / "bin/python")]
    done = subprocess.run(
        [*install, "-c", str(PROJECT / "pins.txt"), *requirements()], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"the packages could not be installed: {done.stderr.strip()[-300:]}")
    return folder / "bin/python"


def _outside(folder: Path) -> dict[str, str]:
    """Where neither the project nor this environment is to be seen."""
    keep = {name: os.environ[name] for name in ("HOME", "LANG", "MLFLOW_TRACKING_URI") if name in os.environ}
    return {**keep, "PATH": f"{folder}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_champion_runs_where_only_the_slim_core_and_mlflow_are_installed(
    client: MlflowClient, tmp_path: Path, clean_python: Path
) -> None:
    registered(client, tmp_path, 0, record(1.0))
    promote_best(client, NAME, check=no_check)
    (tmp_path / "unavailable").mkdir()
    environment = _outside(clean_python.parent)
    done = subprocess.run(
        [str(clean_python), "-I", "-c", PROGRAM],
        cwd=tmp_path / "unavailable",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    images = np.array(json.loads(done.stdout.splitlines()[-1]))
    expected = load_model(tmp_path / "weights-0.safetensors").sample(4, seed=0, solver="ddpm", steps=250)
    assert images.shape == (4, 8, 8, 3)
    assert np.abs(images - expected.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_serves_images_over_http(client: MlflowClient, tmp_path: Path, clean_python: Path) -> None:
    registered(client, tmp_path, 0, record(1.0))
    promote_best(client, NAME, check=no_check)
    port = free_port()
    command = [str(clean_python), "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@{CHAMPION}"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=_outside(clean_python.parent), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: healthy(f"http://127.0.0.1:{port}/ping", 2), 180)

        def answer(row: dict[str, object]) -> dict[str, Any]:
            body = json.dumps({"dataframe_records": [row]}).encode()
            address, kind = f"http://127.0.0.1:{port}/invocations", {"Content-Type": "application/json"}
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(urllib.request.Request(address, body, kind), timeout=60) as found:
                    return dict(json.load(found))
            except urllib.error.HTTPError as error:
                return {"code": error.code, **json.load(error)}

        # Many at a time, each with its own images.
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(answer, ({"count": 2, "seed": i % 3} for i in range(24))))
        refused = answer({"count": 0})
    finally:
        kill(server)
    assert refused["code"] == 400
    assert refused["message"] == "count: found 0, expected a number of images, at least 1."
    model = load_model(tmp_path / "weights-0.safetensors")
    for i, answer in enumerate(answers):
        images = [Image.open(io.BytesIO(base64.b64decode(row["image"]))) for row in answer["predictions"]]
        expected = model.sample(2, seed=i % 3).permute(0, 2, 3, 1).numpy().astype(int)
        assert np.abs(np.stack(list(map(np.asarray, images))) - expected).max() <= 1
