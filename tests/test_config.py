"""params.yaml: what is accepted, and one sentence for each kind of mistake, before any work."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from dvdp import UserError, config
from dvdp.config import Params, Run, TrainingParams, check_says_every_key, parse_overrides, parse_params, read_params
from dvdp.diffusion.schedule import ATTENUATIONS
from dvdp.diffusion.solvers import SOLVERS
from dvdp.diffusion.timesteps import TIMESTEP_SPACINGS
from dvdp.yaml_files import dump_yaml

PROJECT = next(folder for folder in Path(__file__).parents if (folder / "params.yaml").exists())

DVDP = {"process": "dvdp", "turning_points": [300, 600]}


def setting(**changes: Any) -> dict[str, Any]:
    return {"settings": {"a": {**DVDP, **changes}}}


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
    "unknown key": (
        {"model": {"modle_channels": 3}},
        ["model.modle_channels: unknown key", "did you mean 'model_channels'?"],
    ),
    "unknown key, no hint": ({"model": {"zzz": 3}}, ["model.zzz: unknown key, expected one of prediction_type,"]),
    "unknown key of a setting": (
        setting(turningpoints=[3]),
        ["settings.a.turningpoints", "did you mean 'turning_points'?"],
    ),
    "key missing": ({"settings": {"a": {}}}, ["settings.a.process", "found nothing"]),
    "no mapping": ([1, 2], ["found [1, 2]"]),
    "a section that is no mapping": ({"schedule": None}, ["schedule: found None"]),
    "word for a number": ({"schedule": {"timesteps": "many"}}, ["schedule.timesteps: found 'many'", "a whole number"]),
    "fraction for a whole number": ({"sampling": {"steps": 10.5}}, ["sampling.steps: found 10.5", "a whole number"]),
    "number for a list": (setting(turning_points=600), ["settings.a.turning_points: found 600"]),
    "fraction for a turning point": (setting(turning_points=[600.5]), ["settings.a.turning_points.0", "600.5"]),
    "word for a seed": ({"seeds": ["x"]}, ["seeds.0: found 'x'"]),
    "list for a name": ({"dataset": {"name": [1]}}, ["dataset.name: found [1]"]),
    "unknown process": (setting(process="dvpd"), ["settings.a.process: found 'dvpd'", "'dvdp'"]),
    "unknown base": ({"schedule": {"base": "liner"}}, ["schedule.base: found 'liner'", "'linear'"]),
    "unknown attenuation": ({"schedule": {"attenuation": "cosin"}}, ["schedule.attenuation", "did you mean 'cosine'?"]),
    "unknown solver": ({"sampling": {"solver": "ddmp"}}, ["sampling.solver", "did you mean 'ddpm'?"]),
    "unknown target": (
        {"model": {"prediction_type": "epsilom"}},
        ["model.prediction_type: found 'epsilom' (did you mean 'epsilon'?)", "'sample'"],
    ),
    "eta above 1": ({"sampling": {"eta": 3}}, ["sampling.eta: found 3, expected at most 1"]),
    "negative learning rate": (
        {"training": {"learning_rate": -1}},
        ["training.learning_rate: found -1, expected a number above 0"],
    ),
    "no images": ({"training": {"images": 0}}, ["training.images: found 0"]),
    "tiny images": ({"dataset": {"resolution": 2}}, ["dataset.resolution: found 2"]),
    "unknown encoding": ({"dataset": {"encoding": "jpg"}}, ["dataset.encoding: found 'jpg'", "'jpeg'"]),
    "no such quality": ({"dataset": {"jpeg_quality": 101}}, ["dataset.jpeg_quality: found 101", "at most 100"]),
    "no space in a file": ({"dataset": {"shard_gib": 0}}, ["dataset.shard_gib: found 0", "above 0"]),
    "fewer than no processes": ({"dataset": {"workers": -1}}, ["dataset.workers: found -1", "at least 0"]),
    "odd name": ({"dataset": {"name": "a/b"}}, ["dataset.name: found 'a/b'"]),
    "folder missing": ({"dataset": {"source": "image_folder"}}, ["dataset.path: found nothing"]),
    "zip missing": ({"dataset": {"source": "celeba"}}, ["dataset.path: found nothing", "img_align_celeba.zip"]),
    "unknown source": ({"dataset": {"source": "celebs"}}, ["dataset.source: found 'celebs'", "did you mean 'celeba'?"]),
    "no timesteps": ({"schedule": {"timesteps": 0}}, ["schedule.timesteps: found 0"]),
    "floor of 0": ({"schedule": {"floor": 0}} | setting(), ["schedule.floor: found 0, expected a number above 0"]),
    "dropout above 1": ({"model": {"dropout": 2}}, ["model.dropout: found 2, expected at most 1"]),
    "odd channels": ({"model": {"model_channels": 30}}, ["model.model_channels: found 30", "multiple of 4"]),
    "no stages": ({"model": {"channel_mult": []}}, ["model.channel_mult: found []"]),
    "attention nowhere": ({"model": {"attention_factors": [64]}}, ["model.attention_factors: found factor 64"]),
    "odd heads": ({"model": {"num_head_channels": 48}}, ["model.num_head_channels: found 48"]),
    "no groups": ({"training": {"groups": 0}}, ["training.groups: found 0"]),
    "groups by a word": ({"training": {"groups": "all"}}, ["training.groups: found 'all'"]),
    "no ranks": ({"cluster": {"num_workers": 0}}, ["cluster.num_workers: found 0"]),
    "turning points out of order": (setting(turning_points=[600, 300]), ["settings.a.turning_points", "[600, 300]"]),
    "turning point twice": (setting(turning_points=[300, 300]), ["settings.a.turning_points", "[300, 300]"]),
    "turning point at 0": (setting(turning_points=[0]), ["settings.a.turning_points", "[0]"]),
    "turning point at T": (setting(turning_points=[1000]), ["settings.a.turning_points", "between 1 and 999"]),
    "turning points of ddpm": (setting(process="ddpm"), ["settings.a.turning_points", "expected none"]),
    "resolution not divisible": (
        setting() | {"dataset": {"resolution": 30}},
        ["dataset.resolution: found 30", "in setting 'a'", "30"],
    ),
    "too many stages": (
        setting() | {"model": {"channel_mult": [1] * 5}},
        ["model.channel_mult: found ", "5 stages", "8 px"],
    ),
    "fewer steps than levels": (
        setting() | {"sampling": {"steps": 2}},
        ["sampling.steps: found 2, expected at least 3"],
    ),
    "fewer preview steps than levels": (
        setting() | {"training": {"preview_steps": 2}},
        ["training.preview_steps: found 2, expected at least 3"],
    ),
    "more steps than timesteps": ({"sampling": {"steps": 1001}}, ["sampling.steps", "1001", "at most 1000"]),
    "more scored than drawn": ({"sampling": {"count": 10}}, ["evaluation.samples: found 256", "sampling.count, 10"]),
    "more scored than drawn by an override": (
        setting(overrides={"sampling": {"count": 10}}),
        ["evaluation.samples: found 256", "sampling.count, 10"],
    ),
    "subset larger than the sample": (
        {"evaluation": {"samples": 50, "kid_subset": 60}},
        ["evaluation.kid_subset: found 60"],
    ),
    "likelihood of one image": (
        {"evaluation": {"likelihood": 1}},
        ["evaluation.likelihood: found 1, expected 0 (none) or at least 2 images"],
    ),
    "likelihood of a process of one step": (
        setting(process="ddpm", turning_points=[])
        | {"schedule": {"timesteps": 1}, "sampling": {"steps": 1}, "training": {"preview_steps": 1}}
        | {"evaluation": {"likelihood": 8}},
        ["evaluation.likelihood: found 8 beside schedule.timesteps 1", "in setting 'a'"],
    ),
    "guidance without label dropout": (
        setting() | {"sampling": {"guidance_scale": 2}},
        ["sampling.guidance_scale: found 2.0 for a network that is trained without label_dropout, expected 1,"],
    ),
    "guidance of an unconditional network": (
        setting() | {"sampling": {"guidance_scale": [1, 1, 3]}, "model": {"num_classes": 0}},
        ["sampling.guidance_scale: found [1.0, 1.0, 3.0] for a network that is unconditional", "in setting 'a'"],
    ),
    "a guidance scale for too few levels": (
        setting() | {"sampling": {"guidance_scale": [1, 3]}, "training": {"label_dropout": 0.1}},
        ["sampling.guidance_scale: found 2 numbers, [1.0, 3.0], expected one for each of 3 levels, finest first"],
    ),
    "a guidance scale by level and levels that are not known": (
        setting(turning_points="auto", tolerance=0.01)
        | {"sampling": {"guidance_scale": [1]}, "training": {"label_dropout": 0.1}},
        ["sampling.guidance_scale: found [1.0] beside 'turning_points: auto', expected a number"],
    ),
    "a guidance scale that is none": (
        {"sampling": {"guidance_scale": "high"}},
        ["sampling.guidance_scale: found 'high', expected a number or a list"],
    ),
    "a negative guidance scale": (
        {"sampling": {"guidance_scale": -1}},
        ["sampling.guidance_scale: found -1, expected at least 0 or a list"],
    ),
    "a negative guidance scale of a level": (
        {"sampling": {"guidance_scale": [1, -1]}},
        ["sampling.guidance_scale"],
    ),
    "labels that are all dropped": (
        {"training": {"label_dropout": 1.0}},
        ["training.label_dropout: found 1.0, expected a number below 1"],
    ),
    "label dropout of an unconditional network": (
        setting() | {"training": {"label_dropout": 0.1}, "model": {"num_classes": 0}},
        ["training.label_dropout: found 0.1 for an unconditional network (model.num_classes is 0), expected 0"],
    ),
    "thresholding without clipping": (
        {"sampling": {"thresholding": 0.99, "clip": False}},
        ["sampling.thresholding: found 0.99 beside 'clip: false', expected 'clip: true'"],
    ),
    "override of an unknown section": (
        setting(overrides={"modle": {"model_channels": 8}}),
        ["settings.a.overrides.modle: unknown key", "did you mean 'model'?"],
    ),
    "override of a section that all share": (
        setting(overrides={"dataset": {"resolution": 8}}),
        ["settings.a.overrides.dataset: unknown key", "expected one of schedule"],
    ),
    "override of an unknown key": (
        setting(overrides={"model": {"modle_channels": 8}}),
        ["settings.a.overrides.model.modle_channels", "did you mean 'model_channels'?"],
    ),
    "override of the wrong type": (
        setting(overrides={"model": {"model_channels": "wide"}}),
        ["settings.a.overrides.model.model_channels: found 'wide'"],
    ),
    "override out of range": (
        setting(overrides={"model": {"model_channels": 30}}),
        ["settings.a.overrides.model.model_channels: found 30"],
    ),
    "override that is no mapping": (setting(overrides={"model": 3}), ["settings.a.overrides.model: found 3"]),
    "override that does not fit the setting": (
        setting(overrides={"sampling": {"steps": 2}}),
        ["sampling.steps: found 2, expected at least 3"],
    ),
    "not finite": ({"training": {"learning_rate": float("inf")}}, ["training.learning_rate: found inf", "finite"]),
    "not a number": ({"training": {"clip_norm": float("nan")}}, ["training.clip_norm: found nan", "finite"]),
    "more timesteps than a machine bears": ({"schedule": {"timesteps": 10**6}}, ["found 1000000, expected at most"]),
    "images too large": ({"dataset": {"resolution": 8192}}, ["dataset.resolution: found 8192, expected at most 4096"]),
    "batch too large": ({"training": {"batch": 10**7}}, ["training.batch: found 10000000, expected at most 1000000"]),
    "name too long": ({"dataset": {"name": "a" * 101}}, ["dataset.name: found 'aaa", "at most 100 characters"]),
    "too many seeds": ({"seeds": list(range(1001))}, ["seeds: found [0, 1", "at most 1000"]),
    "key that is no word": ({"model": {1: 2}}, ["model.1: found 1, expected a word"]),
    "settings as a list": (
        {"settings": [{"name": "a", **DVDP}]},
        [
            "settings: found [{'name': 'a', 'process': 'dvdp',",
            "expected a mapping by name, each as 'dvdp-600: {process: ",
        ],
    ),
    "dot in a name": (
        {"settings": {"a.b": DVDP}},
        ["settings.'a.b': found 'a.b', expected letters a to z, digits, '-' and '_' alone"],
    ),
    "number for a name": ({"settings": {600: DVDP}}, ["settings.600: found 600, expected text, in quotes"]),
    "one seed twice": ({"seeds": [3, 3]}, ["seeds: found [3, 3]"]),
    "no settings": ({"settings": {}}, ["settings: found {}, expected at least 1 of them"]),
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


def test_what_is_no_readable_file_is_answered_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path / "dangling",
        tmp_path / "circle",
        tmp_path / "pipe",
        Path("/dev/zero"),
        Path(),
        Path("a\0b"),
    ):
        with pytest.raises(UserError, match="found no file"):
            read_params(path)
    with pytest.raises(UserError, match=r"cannot read .*File name too long"):
        read_params(tmp_path / ("a" * 300))

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "params.yaml").touch()
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"cannot read .*Permission denied") as caught:
        read_params(tmp_path / "params.yaml")
    check_sentence(str(caught.value).replace(str(tmp_path), ""))


def test_what_dvc_reads_must_say_every_key(tmp_path: Path) -> None:
    check_says_every_key(PROJECT / "params.yaml")
    path = tmp_path / "params.yaml"
    path.write_text(dump_yaml(Params().describe()))
    check_says_every_key(path)
    for section, values in Params().describe().items():
        tree, name = Params().describe(), section
        if isinstance(values, dict) and section != "settings":
            name = f"{section}.{tree[section].popitem()[0]}"
        else:
            del tree[section]
        path.write_text(dump_yaml(tree))
        with pytest.raises(UserError) as caught:
            check_says_every_key(path)
        check_sentence(str(caught.value), f"{path}: {name}: found nothing, expected a value for every key")


def test_empty_file_is_the_demo_and_the_demo_says_every_key(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("# nothing but a comment\n")
    assert read_params(path) == Params() == read_params(PROJECT / "params.yaml")
    said, every = yaml.safe_load((PROJECT / "params.yaml").read_text()), Params().describe()
    assert list(said) == list(every)
    assert all(list(said[name]) == list(every[name]) for name in said if isinstance(said[name], dict))


@pytest.mark.parametrize("preset", sorted((PROJECT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_preset_says_only_what_differs_from_the_defaults(preset: Path) -> None:
    said, default, whole = yaml.safe_load(preset.read_text()), Params().describe(), read_params(preset).describe()
    for section, values in said.items():
        assert values != default[section], section
        if isinstance(values, dict) and section != "settings":
            assert all(value != default[section][key] for key, value in values.items()), section
            assert {**default[section], **values} == whole[section]


def test_names_are_those_of_the_registries() -> None:
    assert set(get_args(config.Attenuation)) == set(ATTENUATIONS)
    assert set(get_args(config.SolverName)) == set(SOLVERS)
    assert set(get_args(config.TimestepSpacing)) == set(TIMESTEP_SPACINGS)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("training.batch=16", lambda params: params.training.batch == 16),
        ("training.learning_rate=1e-4", lambda params: params.training.learning_rate == 1e-4),
        ("settings.dvdp-600.turning_points=[500]", lambda params: params.settings["dvdp-600"].turning_points == (500,)),
        ("settings.dvdp-600.overrides.training.batch=8", lambda params: params.runs()[1].training.batch == 8),
        ("model.channel_mult.2=2", lambda params: params.model.channel_mult == (1, 2, 2)),
        ("seeds=[1, 2]", lambda params: params.seeds == (1, 2)),
        ("dataset.path=null", lambda params: params.dataset.path is None),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["empty file", "whole file"])
def test_any_field_can_be_overridden(
    override: str, found: Callable[[Params], bool], whole: bool, tmp_path: Path
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(Params().describe(), sort_keys=False) if whole else "")
    params = read_params(path, parse_overrides([override]))
    assert found(params)
    assert parse_params(params.describe()) == params


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"training.batch": "many"}, ["params.yaml -S training.batch=many: training.batch: found 'many', expected a"]),
        (
            {"training.batch": [64]},
            ["params.yaml -S training.batch=[64]: training.batch: found [64], expected a whole"],
        ),
        ({"training.bacth": 64}, ["training.bacth: unknown key (did you mean 'batch'?)"]),
        ({"": 64}, [": unknown key, expected one of dataset"]),
        ({"training.batch.size": None}, ["-S training.batch.size: found 'size' below the value 32"]),
    ],
)
def test_overrides_as_a_mapping_are_checked_alike(overrides: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_params(PROJECT / "params.yaml", overrides)
    check_sentence(str(caught.value), *parts)


def test_the_last_of_two_overrides_of_a_key_counts() -> None:
    texts = ["training={batch: 8}", "training.batch=16", "training={batch: 32}"]
    assert read_params(PROJECT / "params.yaml", parse_overrides(texts)).training.batch == 32
    assert list(parse_overrides(texts)) == ["training.batch", "training"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.batch", ["-S: found 'training.batch', expected KEY=VALUE"]),
        ("training.bacth=3", ["training.bacth: unknown key", "did you mean 'batch'?"]),
        ("training.batch=many", ["training.batch: found 'many', expected a whole number"]),
        ("training.batch.size=3", ["-S training.batch.size: found 'size' below the value 32"]),
        ("model.channel_mult.3=1", ["-S model.channel_mult.3: found position '3', expected a number below 3"]),
        ("model.channel_mult.first=1", ["-S model.channel_mult.first: found position 'first'"]),
        (
            "settings.dvdp600.turning_points=[500]",
            ["found no setting 'dvdp600' (did you mean 'dvdp-600'?), expected one of ddpm, dvdp-600, dvdp-300-600"],
        ),
        ("seeds=[1", ["-S seeds: found '[1', expected YAML"]),
        ("=1", ["-S: found '=1'"]),
    ],
)
def test_mistake_in_an_override_is_answered_with_one_sentence(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_params(PROJECT / "params.yaml", parse_overrides([override]))
    check_sentence(str(caught.value), *parts)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("schedule.timesteps=1000000000", "schedule.timesteps: found 1000000000, expected at most 10000"),
        ("settings.dvdp-600.overrides.schedule.timesteps=1000000000", "found 1000000000, expected at most 10000"),
        (
            "settings.dvdp-600.overrides.sampling.batch=2000000",
            "sampling.batch: found 2000000, expected at most",
        ),
        ("settings.dvdp-600.overrides.training.batch=true", "training.batch: found True, expected a whole number"),
        ("training.learning_rate=.inf", "training.learning_rate: found inf, expected a finite number"),
        ("training.compile=yes", "training.compile: found 'yes', expected true or false"),
        (f"seeds={list(range(400))}", "seeds: found 400 for each of 3 settings, expected at most 1,000 runs in all"),
        ("seeds=&a [*a]", "-S seeds: found '&a [*a]', expected YAML"),
        ("a." * 5000 + "b=1", "unknown key"),
        ("training.batch=" + "9" * 5000, "-S training.batch: found '999"),
    ],
)
def test_overrides_have_the_same_bounds(override: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        read_params(PROJECT / "params.yaml", parse_overrides([override]))
    assert told in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("timesteps", [1, 2, 11, 1000, 10_000])
@pytest.mark.parametrize("shift", [-20.0, 20.0])
def test_every_schedule_that_is_allowed_can_be_built(timesteps: int, shift: float) -> None:
    """So params are checked without the tables, whose arithmetic needs torch."""
    last = timesteps - 1
    chosen = {(), (1,), (last,), tuple(range(1, 11)), tuple(range(last - 9, timesteps))}
    for points in chosen:
        if any(not a < b for a, b in pairwise((0, *points, timesteps))):
            continue
        for base in ("linear", "cosine"):
            for floor in (1e-6, 1.0):
                for attenuation in get_args(config.Attenuation):
                    section = config.ScheduleParams(timesteps, base, shift, attenuation, floor)
                    schedule = section.build("dvdp", points)
                    assert schedule.signal.float().min() > 0
                    assert schedule.noise[:, 1:].float().min() > 0
            config.ScheduleParams(timesteps, base, shift).build("subspace", points)


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
        schedule: {floor: 0.2, shift: -1}
        settings:
          plain: {process: ddpm}
          "600": {process: dvdp, turning_points: [600]}
        seeds: [0, 1, 2]
        training: {learning_rate: 1e-4, images: 5}
        """
    )
    params = read_params(path)
    assert params.dataset.path == Path("faces")
    assert params.training.learning_rate == 1e-4
    assert params.settings["600"].turning_points == (600,)
    runs = params.runs()
    assert [(run.setting, run.seed) for run in runs] == [(s, i) for s in ("plain", "600") for i in range(3)]
    assert {run.resolution for run in runs} == {64}


def test_overrides_apply_to_their_setting_alone() -> None:
    params = parse_params(
        {
            "training": {"precision": "fp32", "groups": 1},
            "settings": {
                "plain": {"process": "ddpm"},
                "a": {
                    **DVDP,
                    "overrides": {
                        "schedule": {"floor": 0.3},
                        "model": {"prediction_type": "sample", "attention_factors": []},
                        "training": {"batch": 8},
                        "sampling": {"steps": 30},
                    },
                },
                "b": DVDP,
            },
        }
    )
    plain, changed, other = params.runs()
    assert (plain.schedule, plain.model, plain.training, plain.sampling) == (
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
        schedule=params.schedule,
        model=params.model,
        training=params.training,
        sampling=params.sampling,
    )
    assert changed.build_schedule().signal[0, 300] == 0.3 * changed.build_schedule().signal[2, 300]


def test_a_setting_gives_its_schedule() -> None:
    params = parse_params(
        {
            "schedule": {"timesteps": 500, "base": "cosine", "shift": -0.5, "attenuation": "linear"},
            "settings": {
                "d": {"process": "ddpm"},
                "s": {"process": "subspace", "turning_points": [200]},
                "v": {"process": "dvdp", "turning_points": [200]},
            },
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


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("", "found '', expected a path"),
        ("a\0b", r"found 'a\x00b', expected a path"),
        (
            2024,
            "found 2024, expected a path without control characters, in quotes where it looks like a number",
        ),
    ],
)
def test_a_path_that_cannot_be_one_is_named(path: object, text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_params({"dataset": {"source": "image_folder", "path": path}})
    assert str(error.value).startswith(f"params: dataset.path: {text}")


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    params = parse_params({"dataset": {"source": "image_folder", "path": "~/pets"}, "cluster": {"storage": "~/runs"}})
    assert (params.dataset.path, params.cluster.storage) == (Path("/home/user/pets"), Path("/home/user/runs"))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # Where there is no such user.
    assert parse_params({"cluster": {"storage": "~nobody/runs"}}).cluster.storage == Path("~nobody/runs")


@pytest.mark.parametrize("name", ["a\nb", " ", "a ", "\u202ea", ""])
def test_an_experiment_has_a_name_that_can_be_seen(name: str) -> None:
    with pytest.raises(UserError, match=r"^params: tracking\.experiment: found '.*', expected ") as error:
        parse_params({"tracking": {"experiment": name}})
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["", "a b", "a\n", "a/b", "..", "~", "é", "x" * 101, 600, None])
def test_names_of_data_sets_settings_and_models_are_file_names(name: object) -> None:
    for tree in (
        {"dataset": {"name": name}},
        {"tracking": {"model": name}},
        {"settings": {name: {"process": "ddpm"}}},
    ):
        with pytest.raises(UserError, match=r"name|model|settings"):
            parse_params(tree)
    assert parse_params({"dataset": {"name": "600"}}).dataset.name == "600"


def test_groups_are_as_many_as_ranks_where_params_do_not_say() -> None:
    def run(**sections: Any) -> Run:
        return parse_params({"settings": {"ddpm": {"process": "ddpm"}}, **sections}).runs()[0]

    auto, said = run(cluster={"num_workers": 4}), run(cluster={"num_workers": 2}, training={"groups": 4})
    assert auto.training.groups == 4
    assert auto == said, "so that it goes on with other ranks"
    assert [auto.training.groups_on(ranks) for ranks in (1, 2, 4)] == [4, 4, 4]
    with pytest.raises(UserError, match=r"training\.groups: found 4, expected a multiple of the 3 ranks"):
        auto.training.groups_on(3)
    assert TrainingParams(batch=12).groups_on(3) == 3
    with pytest.raises(UserError, match=r"training\.batch: found 12, expected a multiple of training\.groups, 5"):
        TrainingParams(batch=12).groups_on(5)
