"""The study of guidance measures trained networks at every scale, and its picture is drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from benchmarks import guidance, guidance_pictures
from benchmarks.study import prepared
from dvdp.config import read_params
from dvdp.identity import training_hash
from dvdp.models.export import save_model
from dvdp.models.unet import build_network
from tests.benchmarks.test_studies import PARAMS

PROJECT = Path(__file__).parents[2]


@pytest.mark.slow
def test_guidance_is_measured_at_every_scale_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        **PARAMS,
        "settings": {"dvdp-500": {"process": "dvdp", "turning_points": [500]}},
        "seeds": [0],
        "model": {**PARAMS["model"], "num_classes": 10},  # type: ignore[dict-item]
        "training": {**PARAMS["training"], "label_dropout": 0.1, "precision": "fp32"},  # type: ignore[dict-item]
        "sampling": {"count": 16, "steps": 4},
        "evaluation": {**PARAMS["evaluation"], "samples": 16, "kid_subset": 4},  # type: ignore[dict-item]
    }
    file, work, out = tmp_path / "params.yaml", tmp_path / "work", tmp_path / "found.json"
    file.write_text(yaml.safe_dump(tree))
    params = read_params(file)
    store, run = prepared(params, work / "digits", None), params.runs()[0]
    torch.manual_seed(0)
    network = build_network(run.model, 1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    weights = work / "runs" / training_hash(run, store.metadata.digest, False) / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    about = {"run": run.describe(), **store.metadata.model_metadata(1)}
    save_model(weights, network.state_dict(), about)

    arguments = ["--params", str(file), "--work", str(work), "--scales", "1", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["guidance", *arguments])
    guidance.main()
    found = json.loads(out.read_text())
    assert [(row["where"], row["scale"]) for row in found["runs"]] == [
        (where, scale) for scale in (1.0, 3.0) for where in ("all levels", "coarsest level")
    ]
    first, second, *guided = [row["fd_labels"] for row in found["runs"]]
    assert first == second, "a scale of 1 is none, wherever it is"
    assert len({first, *guided}) == 3
    assert all(0 <= row["accuracy"] <= 1 for row in found["runs"])
    assert found["means"]["dvdp-500, all levels, 3.0"]["accuracy"]["mean"] == found["runs"][2]["accuracy"]

    picture = tmp_path / "guidance.png"
    asked = ["--weights", str(weights), "--data", str(work / "digits" / "store"), "--out", str(picture)]
    monkeypatch.setattr(sys, "argv", ["guidance_pictures", *asked])
    guidance_pictures.main()
    assert Image.open(picture).width > 16 * 8 * 2


def test_the_committed_study_is_of_a_network_that_can_be_guided() -> None:
    (run, *_) = read_params(PROJECT / "benchmarks/guidance_digits.yaml").runs()
    assert run.model.num_classes == 10
    assert run.training.label_dropout == 0.1
