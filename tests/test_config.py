"""params.yaml: what is accepted, and one sentence for each kind of mistake, before any work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdp import UserError
from dvdp.config import Params, parse_params, read_params

DVDP = {"name": "a", "process": "dvdp", "turning_points": [300, 600]}


def setting(**changes: Any) -> dict[str, Any]:
    return {"settings": [{**DVDP, **changes}]}


def check_sentence(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, text
    assert text.endswith("."), text
    assert "\n" not in text, text
    assert ". " not in text, text
    assert ": :" not in text, text
    assert "pydantic" not in text, text


#: What is wrong, the tree, and what the answer must contain.
MISTAKES: dict[str, tuple[Any, list[str]]] = {
    "unknown section": ({"trainng": {}}, ["trainng: unknown key", "did you mean 'training'?"]),
    "unknown key": ({"model": {"chanels": 3}}, ["model.chanels: unknown key", "did you mean 'channels'?"]),
    "unknown key, no hint": ({"model": {"zzz": 3}}, ["model.zzz: unknown key, expected one of prediction_type,"]),
    "unknown key of a setting": (
        setting(turningpoints=[3]),
        ["settings.0.turningpoints", "did you mean 'turning_points'?"],
    ),
    "key missing": ({"settings": [{"process": "ddpm"}]}, ["settings.0.name", "found nothing"]),
    "no mapping": ([1, 2], ["found [1, 2]"]),
    "a section that is no mapping": ({"process": None}, ["process", "found None"]),
    "word for a number": ({"process": {"timesteps": "many"}}, ["process.timesteps: found 'many'", "integer"]),
    "fraction for a whole number": ({"sampling": {"steps": 10.5}}, ["sampling.steps: found 10.5", "integer"]),
    "number for a list": (setting(turning_points=600), ["settings.0.turning_points: found 600"]),
    "fraction for a turning point": (setting(turning_points=[600.5]), ["settings.0.turning_points.0", "600.5"]),
    "word for a seed": ({"seeds": ["x"]}, ["seeds.0: found 'x'"]),
    "list for a name": ({"dataset": {"name": [1]}}, ["dataset.name: found [1]"]),
    "unknown process": (setting(process="dvpd"), ["settings.0.process: found 'dvpd'", "'dvdp'"]),
    "unknown base": ({"process": {"base": "liner"}}, ["process.base: found 'liner'", "'linear'"]),
    "unknown attenuation": ({"process": {"attenuation": "cosin"}}, ["process.attenuation", "did you mean 'cosine'?"]),
    "unknown solver": ({"sampling": {"solver": "ddmp"}}, ["sampling.solver", "did you mean 'ddpm'?"]),
    "unknown target": ({"model": {"prediction_type": "nose"}}, ["model.prediction_type: found 'nose'", "'noise'"]),
    "eta above 1": ({"sampling": {"eta": 3}}, ["sampling.eta: found 3.0"]),
    "negative learning rate": ({"training": {"learning_rate": -1}}, ["training.learning_rate: found -1.0"]),
    "no images": ({"training": {"images": 0}}, ["training.images: found 0"]),
    "tiny images": ({"dataset": {"resolution": 2}}, ["dataset.resolution: found 2"]),
    "unknown encoding": ({"dataset": {"encoding": "jpg"}}, ["dataset.encoding: found 'jpg'", "'jpeg'"]),
    "no such quality": ({"dataset": {"jpeg_quality": 101}}, ["dataset.jpeg_quality: found 101", "from 1 to 100"]),
    "no slots in a file": ({"dataset": {"shard_gib": 0}}, ["dataset.shard_gib: found 0.0", "above 0"]),
    "fewer than no processes": ({"dataset": {"workers": -1}}, ["dataset.workers: found -1", "at least 0"]),
    "odd name": ({"dataset": {"name": "a/b"}}, ["dataset.name: found 'a/b'"]),
    "folder missing": ({"dataset": {"source": "image_folder"}}, ["dataset.path: found nothing"]),
    "zip missing": ({"dataset": {"source": "celeba"}}, ["dataset.path: found nothing", "img_align_celeba.zip"]),
    "unknown source": ({"dataset": {"source": "celebs"}}, ["dataset.source: found 'celebs'", "did you mean 'celeba'?"]),
    "no timesteps": ({"process": {"timesteps": 0}}, ["process.timesteps: found 0"]),
    "floor of 0": ({"process": {"floor": 0}} | setting(), ["floor: found 0.0"]),
    "dropout above 1": ({"model": {"dropout": 2}}, ["model.dropout: found 2.0"]),
    "odd channels": ({"model": {"model_channels": 30}}, ["model.model_channels: found 30", "multiple of 4"]),
    "no stages": ({"model": {"channel_mult": []}}, ["model.channel_mult: found []"]),
    "attention nowhere": ({"model": {"attention_factors": [64]}}, ["model.attention_factors: found factor 64"]),
    "odd heads": ({"model": {"num_head_channels": 48}}, ["model.num_head_channels: found 48"]),
    "no ranks": ({"cluster": {"num_workers": 0}}, ["cluster.num_workers: found 0"]),
    "turning points out of order": (setting(turning_points=[600, 300]), ["settings.a.turning_points", "[600, 300]"]),
    "turning point twice": (setting(turning_points=[300, 300]), ["settings.a.turning_points", "[300, 300]"]),
    "turning point at 0": (setting(turning_points=[0]), ["settings.a.turning_points", "[0]"]),
    "turning point at T": (setting(turning_points=[1000]), ["settings.a.turning_points", "between 1 and 999"]),
    "turning points of ddpm": (setting(process="ddpm"), ["settings.0.turning_points", "expected none"]),
    "resolution not divisible": (
        setting() | {"dataset": {"resolution": 30}},
        ["settings.a", "dataset.resolution", "30"],
    ),
    "too many stages": (
        setting() | {"model": {"channel_mult": [1] * 5}},
        ["settings.a", "channel_mult", "5 stages", "8 px"],
    ),
    "fewer steps than levels": (
        setting() | {"sampling": {"steps": 2}},
        ["settings.a", "sampling.steps", "found 2, expected at least 3"],
    ),
    "fewer preview steps than levels": (
        setting() | {"training": {"preview_steps": 2}},
        ["settings.a", "preview_steps", "found 2, expected at least 3"],
    ),
    "more steps than timesteps": ({"sampling": {"steps": 1001}}, ["sampling.steps", "1001", "at most 1000"]),
    "more scored than drawn": ({"sampling": {"count": 10}}, ["evaluation.samples: found 512", "sampling.count, 10"]),
    "more scored than drawn by an override": (
        setting(overrides={"sampling": {"count": 10}}),
        ["settings.a", "sampling.count", "10", "512"],
    ),
    "subset larger than the sample": (
        {"evaluation": {"samples": 50, "kid_subset": 60}},
        ["evaluation.kid_subset: found 60"],
    ),
    "override of an unknown section": (
        setting(overrides={"modle": {"model_channels": 8}}),
        ["settings.0.overrides", "'modle'", "did you mean 'model'?"],
    ),
    "override of a section that all share": (
        setting(overrides={"dataset": {"resolution": 8}}),
        ["settings.0.overrides", "'dataset'"],
    ),
    "override of an unknown key": (
        setting(overrides={"model": {"chanels": 8}}),
        ["settings.a.overrides.model.chanels", "did you mean 'channels'?"],
    ),
    "override of the wrong type": (
        setting(overrides={"model": {"model_channels": "wide"}}),
        ["settings.a.overrides.model.model_channels: found 'wide'"],
    ),
    "override out of range": (
        setting(overrides={"model": {"model_channels": 30}}),
        ["settings.a.overrides.model.model_channels: found 30"],
    ),
    "override that is no mapping": (setting(overrides={"model": 3}), ["settings.0.overrides.model: found 3"]),
    "override that does not fit the setting": (
        setting(overrides={"sampling": {"steps": 2}}),
        ["settings.a", "sampling.steps", "found 2, expected at least 3"],
    ),
    "one name twice": ({"settings": [DVDP, DVDP]}, ["settings: found the names ['a', 'a']"]),
    "one seed twice": ({"seeds": [3, 3]}, ["seeds: found [3, 3]"]),
    "no settings": ({"settings": []}, ["settings: found the names []"]),
    "no seeds": ({"seeds": []}, ["seeds: found []"]),
}


@pytest.mark.parametrize(("tree", "parts"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_answered_with_one_sentence_that_names_the_key(tree: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_params(tree, "my.yaml")
    check_sentence(str(caught.value), "my.yaml: ", *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "found no file"),
        (b"a: [1,\nb: {", "is no YAML"),
        (b"a: 1\n---\nb: 2", "is no YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is no YAML"),
        (b"\xff\xfe\x00", "is no YAML"),
        (b"dataset: {name: caf\xe9}", "is no YAML"),
    ],
    ids=["missing", "broken", "two documents", "code", "binary", "not UTF-8"],
)
def test_unreadable_file_is_answered_with_one_sentence(content: bytes | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_params(path)
    text = str(caught.value)
    assert part in text
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


def test_a_folder_is_no_params_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        read_params(tmp_path)


def test_empty_file_is_the_demo(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("# nothing but a comment\n")
    assert read_params(path) == Params()


def test_sections_check_themselves_without_a_file() -> None:
    params = Params()
    for section in (params.dataset, params.schedule, params.model, params.training, params.sampling):
        assert dataclasses.replace(section) == section
    with pytest.raises(UserError, match="channels: found 30"):
        dataclasses.replace(params.model, model_channels=30)
    with pytest.raises(UserError, match="attenuation"):
        dataclasses.replace(params.schedule, attenuation="cosin")


def test_file_says_everything_and_numbers_may_be_written_as_yaml_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        """
        dataset: {name: my-faces, source: image_folder, path: faces, resolution: 64}
        process: {floor: 0.2, shift: -1}
        settings:
          - {name: plain, process: ddpm}
          - {name: "600", process: dvdp, turning_points: [600]}
        seeds: [0, 1, 2]
        training: {learning_rate: 1e-4, images: 5}
        """
    )
    params = read_params(path)
    assert params.dataset.path == Path("faces")
    assert params.training.learning_rate == 1e-4
    assert params.settings[1].turning_points == (600,)
    runs = params.runs()
    assert [(run.setting, run.seed) for run in runs] == [(s, i) for s in ("plain", "600") for i in range(3)]
    assert {run.resolution for run in runs} == {64}


def test_overrides_apply_to_their_setting_alone() -> None:
    params = parse_params(
        {
            "settings": [
                {"name": "plain", "process": "ddpm"},
                {
                    **DVDP,
                    "overrides": {
                        "process": {"floor": 0.3},
                        "model": {"prediction_type": "sample", "attention_factors": []},
                        "training": {"batch": 8},
                        "sampling": {"steps": 30},
                    },
                },
                {**DVDP, "name": "b"},
            ]
        }
    )
    plain, changed, other = params.runs()
    assert (plain.process, plain.model, plain.training, plain.sampling) == (
        params.schedule,
        params.model,
        params.training,
        params.sampling,
    )
    assert changed.schedule == dataclasses.replace(params.schedule, floor=0.3)
    assert changed.model == dataclasses.replace(params.model, prediction_type="sample", attention_factors=())
    assert changed.training == dataclasses.replace(params.training, batch=8)
    assert changed.sampling == dataclasses.replace(params.sampling, steps=30)
    assert dataclasses.replace(other, setting="a") == dataclasses.replace(
        changed,
        process=params.schedule,
        model=params.model,
        training=params.training,
        sampling=params.sampling,
    )
    assert changed.build_schedule().signal[0, 300] == 0.3 * changed.build_schedule().signal[2, 300]


def test_a_setting_gives_its_schedule() -> None:
    params = parse_params(
        {
            "process": {"timesteps": 500, "base": "cosine", "shift": -0.5, "attenuation": "linear"},
            "settings": [
                {"name": "d", "process": "ddpm"},
                {"name": "s", "process": "subspace", "turning_points": [200]},
                {"name": "v", "process": "dvdp", "turning_points": [200]},
            ],
        }
    )
    from dvdp import Schedule

    expected = [
        Schedule.ddpm(500, "cosine", -0.5),
        Schedule.subspace([200], 500, "cosine", -0.5),
        Schedule.dvdp([200], 500, "cosine", -0.5, "linear", 0.1),
    ]
    for run, schedule in zip(params.runs(), expected, strict=True):
        assert run.build_schedule().turning_points == schedule.turning_points
        assert torch.equal(run.build_schedule().signal, schedule.signal)
        assert torch.equal(run.build_schedule().noise, schedule.noise)


# --- what an import costs ----------------------------------------------------------------------------------------


MEASURE = """
import json, sys, time
import torch

start = time.process_time()
import dvdp

seconds = time.process_time() - start
by_dvdp = sorted({name.partition(".")[0] for name in sys.modules})
import dvdp.config

dvdp.config.Params()
by_config = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"seconds": seconds, "dvdp": by_dvdp, "config": by_config}))
"""


def test_import_is_quick_beyond_torch_and_drags_in_nothing_optional() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["seconds"] < 0.5
    optional = {"lmdb", "ray", "mlflow", "prefect", "dvc", "matplotlib", "sklearn", "albumentations", "pydantic"}
    assert not optional & set(found["config"])
    assert not (optional | {"yaml"}) & set(found["dvdp"])
