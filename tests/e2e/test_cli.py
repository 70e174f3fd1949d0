"""Bad input: one sentence on stderr, exit status 2, no traceback, before any work."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dvdp.training import checkpoints
from pipelines.cli import main
from tests.e2e.support import TINY
from tests.tracking.support import free_port

Answer = Callable[..., str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared data set, and nothing else."""
    folder, before = tmp_path_factory.mktemp("store"), Path.cwd()
    (folder / "params.yaml").write_text(yaml.safe_dump(TINY))
    os.chdir(folder)
    try:
        assert main(["prepare"]) == 0
    finally:
        os.chdir(before)
    return folder / "data"


@pytest.fixture
def answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Runs a command on changed params in an empty folder; returns its one sentence, without the `dvdp: `."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)

    def run(*command: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> str:
        tree = copy.deepcopy(TINY)
        change(tree)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        files = set(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(command) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("dvdp: ")
        assert line.endswith(".")
        left = [path for path in set(tmp_path.rglob("*")) - files if not path.name.endswith(".lock")]
        assert [path for path in left if path.is_file()] == [], "work was begun"
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        return line.removeprefix("dvdp: ")

    yield run
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


NEED_DATA = ("extractor", "reference", "train", "sample", "evaluate", "audit", "plan", "experiment")
COMMANDS = ("check", "prepare", "report", *NEED_DATA)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_mistyped_key(answer: Answer, command: str) -> None:
    said = answer(command, change=lambda tree: tree["training"].update(learning_rat=0.1))
    assert said.startswith(
        "params.yaml: training.learning_rat: unknown key (did you mean 'learning_rate'?), expected one of start,"
    )


def setting(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree["settings"]["dvdp-600"].update(changes)


def section(name: str, /, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree[name].update(changes)


@pytest.mark.parametrize(
    ("change", "named", "told"),
    [
        (lambda tree: tree.update(trainin={}), "trainin", "did you mean 'training'?"),
        (lambda tree: tree.update(settings={}), "settings", "expected at least 1 of them"),
        (setting(turning_points=[600, 300]), "turning_points", "[600, 300]"),
        (setting(turning_points=[300, 300]), "turning_points", "[300, 300]"),
        (setting(turning_points=[0]), "turning_points", "[0]"),
        (setting(turning_points=[1000]), "turning_points", "[1000]"),
        (setting(turning_points=["early"]), "turning_points", "early"),
        (setting(process="dvpd"), "settings.dvdp-600.process", "dvpd"),
        (lambda tree: tree.update(settings=[{"process": "ddpm"}]), "settings", "expected a mapping by name"),
        (setting(overrides={"dataset": {"resolution": 8}}), "overrides", "dataset"),
        (setting(overrides={"training": {"batsch": 8}}), "overrides.training.batsch", "did you mean 'batch'?"),
        (section("dataset", resolution=18), "dvdp-600", "18"),
        (section("dataset", resolution="large"), "dataset.resolution", "large"),
        (section("sampling", steps=1), "sampling.steps", "found 1, expected at least 2"),
        (section("sampling", steps=1001), "sampling.steps", "found 1001"),
        (section("training", preview_steps=1), "training.preview_steps", "found 1, expected at least 2"),
        (section("sampling", solver="dpdm"), "sampling.solver", "did you mean 'ddpm'?"),
        (section("evaluation", samples=65), "evaluation.samples", "found 65, expected at most sampling.count, 64"),
        (section("training", learning_rate=-1), "training.learning_rate", "found -1"),
        (section("model", model_channels=6), "model.model_channels", "found 6"),
        (section("cluster", num_workers=0), "cluster.num_workers", "found 0"),
    ],
)
def test_params_that_do_not_fit_are_named(
    answer: Answer, change: Callable[[dict[str, Any]], object], named: str, told: str
) -> None:
    said = answer("experiment", "--reports", "reports", change=change)
    assert said.startswith("params.yaml: ")
    assert named in said
    assert told in said


def test_a_params_file_that_is_missing_or_no_yaml_is_named(answer: Answer, tmp_path: Path) -> None:
    assert answer("train", "--params", "mine.yaml").startswith("params: found no file 'mine.yaml'")
    (tmp_path / "broken.yaml").write_text("dataset: {name: digits")
    assert answer("train", "--params", "broken.yaml").startswith("params: 'broken.yaml' is no YAML")
    (tmp_path / "twice.yaml").write_text("seeds: [0]\nseeds: [1]\n")
    assert "key 'seeds' is given twice" in answer("train", "--params", "twice.yaml")


def test_sources_without_images_are_named(answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, told in (("empty", "found no images in 'empty'"), ("missing", "found nothing at 'missing'")):
        said = answer("prepare", change=section("dataset", source="image_folder", path=path, name="mine"))
        assert said.startswith(f"dataset.path: {told}")
    said = answer("prepare", change=section("dataset", source="cifar10", path="missing.tar.gz", name="mine"))
    assert said.startswith("dataset.path: found nothing at 'missing.tar.gz'")
    assert "dataset.path: found nothing" in answer("prepare", change=section("dataset", source="image_folder"))


@pytest.mark.parametrize("command", NEED_DATA)
def test_what_needs_a_data_set_says_to_prepare_it(answer: Answer, command: str) -> None:
    said = answer(command, *(("--reports", "reports") if command == "experiment" else ()))
    assert said.startswith("data set: found no store at 'data/digits/store'")
    assert "run `dvdp prepare` first" in said


def test_a_data_set_of_another_resolution_or_without_references_is_refused(
    answer: Answer, tmp_path: Path, store: Path
) -> None:
    (tmp_path / "data").symlink_to(store)
    said = answer("train", change=section("dataset", resolution=32))
    assert said.startswith("dataset.resolution: found 32, expected 16 as in data/digits/store")
    said = answer("experiment", "--reports", "reports")
    assert "run `dvdp extractor` first" in said
    assert answer("evaluate").startswith("extractor: ")


def test_ranks_that_do_not_divide_the_batch_are_refused(answer: Answer, tmp_path: Path, store: Path) -> None:
    (tmp_path / "data").symlink_to(store)
    said = answer("train", change=section("cluster", num_workers=3))
    assert said.startswith("training.batch: found 16")
    odd = {"training": {"batch": 15}}

    def two_ranks(tree: dict[str, Any]) -> None:
        tree["settings"]["dvdp-600"]["overrides"] = odd
        tree["cluster"]["num_workers"] = 2

    said = answer("train", change=two_ranks)
    assert said.startswith("training.batch: found 15, expected a multiple of training.groups, 2")
    assert said.endswith("in setting 'dvdp-600'.")
    assert answer("train", change=section("training", groups=3)).startswith("training.batch: found 16")

    def three_ranks(tree: dict[str, Any]) -> None:
        tree["training"]["groups"] = 2
        tree["cluster"]["num_workers"] = 3

    assert answer("train", change=three_ranks).startswith(
        "training.groups: found 2, expected a multiple of the 3 ranks"
    )


def test_going_on_without_a_state_is_refused(answer: Answer, tmp_path: Path, store: Path) -> None:
    (tmp_path / "data").symlink_to(store)
    assert answer("train", "--resume").startswith("--resume: found no checkpoint of ddpm in 'runs/")
    assert answer("sample").startswith("sample: found no weights of ddpm in 'runs/")
    assert answer("train", "--setting", "dpdm").startswith("--setting, --seed: found no such run")


def test_a_checkpoint_of_another_configuration_is_refused(answer: Answer, tmp_path: Path, store: Path) -> None:
    (tmp_path / "data").symlink_to(store)
    folder = tmp_path / Path(answer("train", "--resume").split("'")[1])
    checkpoints.write(
        folder / "checkpoints", checkpoints.Checkpoint(800, {"x": torch.zeros(1)}), "0123456789ab", keep=1
    )
    said = answer("train", "--resume")
    assert "belongs to configuration 0123456789ab" in said
    assert f"expected {folder.name}" in said


def test_a_scheduled_experiment_needs_the_lock_file_of_dvc(answer: Answer) -> None:
    assert answer("experiment").startswith(("dvc.lock: found no such file", "data set: found no store"))


def test_a_dead_cluster_is_found_at_once(
    answer: Answer, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(store)
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        said = answer("train")
        assert said.startswith(f"RAY_ADDRESS: found nothing that answers at '{address}'")


def test_drawing_names_what_is_wrong_with_its_arguments(answer: Answer, tmp_path: Path) -> None:
    assert answer("draw", "missing.safetensors").startswith("model: found no file 'missing.safetensors'")
    (tmp_path / "text.safetensors").write_text("text")
    assert "no whole safetensors file" in answer("draw", "text.safetensors")
    assert answer("draw", "text.safetensors", "--count", "0").startswith("--count: found 0")
    assert answer("draw", "text.safetensors", "--out", "samples.jpeg").startswith("--out: found 'samples.jpeg'")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ([], "Missing command; see `dvdp --help`."),
        (["trian"], "No such command 'trian' (did you mean 'train'?); see `dvdp --help`."),
        (["train", "--pramas", "x"], "No such option: --pramas"),
        (["train", "--seed", "x"], "Invalid value for '--seed'"),
        (["plan", "--tolerance"], "Option '--tolerance' requires an argument"),
        (["draw"], "Missing argument 'weights'; see `dvdp draw --help`."),
        (["check", "-S", "training.batch"], "-S: found 'training.batch', expected KEY=VALUE"),
        (["check", "-S", "training.bacth=3"], "params.yaml -S training.bacth=3: training.bacth: unknown key"),
        (["experiment", "-S", "settings.dvdp-600.turning_points=[0]"], "settings.dvdp-600.turning_points: found [0]"),
    ],
)
def test_mistake_in_a_command_line_is_one_sentence(answer: Answer, command: list[str], told: str) -> None:
    assert told in answer(*command)


def test_params_are_printed_with_every_key_and_with_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("{dataset: {resolution: 16}}")
    changes = ["-S", "training.batch=8", "-S", "settings.dvdp-600.turning_points=[500]"]
    command = ["params", "--params", "mine.yaml", *changes]
    assert main(command) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["dataset"]["resolution"], tree["training"]["batch"]) == (16, 8)
    assert tree["settings"]["dvdp-600"]["turning_points"] == [500]
    assert main([*command, "--out", "params.yaml"]) == 0
    assert yaml.safe_load(Path("params.yaml").read_text()) == tree
    assert main(["check"]) == 0
    assert "\ndvdp-600 " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["prepare", "extractor", "reference", "experiment"])
def test_a_stage_of_dvc_needs_every_key_said(answer: Answer, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("DVC_STAGE", command)
    said = answer(command, change=lambda tree: tree["dataset"].pop("flip"))
    assert said.startswith("params.yaml: dataset.flip: found nothing, expected a value for every key")
    assert "`dvdp params --params params.yaml --out params.yaml`" in said


@pytest.mark.parametrize("name", ["", ".", "folder", "params.yaml/x", "a" * 250, "/proc/x"])
def test_a_file_that_cannot_be_written_is_named_before_any_work(answer: Answer, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    said = answer("params", "--out", name)
    assert said == f"--out: found '{name}', expected the name of a file in a folder that can be written."
    assert answer("reference", "--export", name).startswith("--export: found '")
    (tmp_path / "picture.png").mkdir(exist_ok=True)
    for command in (("draw", "none"), ("plan",), ("stats",)):
        assert answer(*command, "--out", "picture.png").startswith("--out: found 'picture.png', expected the name")
    assert answer("report", "--out", "params.yaml").startswith("--out: found 'params.yaml/tables.html', expected")


def test_help_lists_every_command_without_importing_torch() -> None:
    code = "import sys; from pipelines.cli import main; main(['--help']); print({'torch', 'ray'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert all(f" {command} " in done.stdout for command in (*COMMANDS, "verify", "stats", "draw", "params"))


def test_names_that_prefect_cannot_keep_are_refused(answer: Answer) -> None:
    name = os.fsdecode(b"caf\xe9.yaml")
    assert answer("experiment", "--params", name).startswith(
        r"--params: found 'caf\xe9.yaml', expected a name in UTF-8"
    )
    assert answer("experiment", "--reports", name).startswith(r"--reports: found 'caf\xe9.yaml'")
    assert answer("check", "--params", name) == (
        r"params: found no file 'caf\xe9.yaml', expected a params.yaml; give its path with --params."
    )
