"""What the docs say of the code stays true."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from dvdp.config import DatasetParams, Params, ScheduleParams, SettingParams, read_params
from dvdp.data.prepare import prepare
from dvdp.data.sources import SOURCES
from dvdp.errors import UserError
from dvdp.models.flops import training_images
from pipelines.reports.paper import TABLES

PROJECT = Path(__file__).parents[1]


def test_every_key_of_params_is_documented_with_its_default() -> None:
    documented: dict[str, dict[str, str]] = {}
    section = ""
    for line in (PROJECT / "docs/params.md").read_text().splitlines():
        if match := re.match(r"\| \*\*(\w+)\*\* \|", line):
            section = match[1]
            documented[section] = {}
        elif match := re.match(r"\| `(\w+)` \| (.*?) \|", line):
            documented[section][match[1]] = match[2].strip()
    sections = {entry.name: entry for entry in dataclasses.fields(Params)}
    assert list(documented) == list(sections)
    for name, keys in documented.items():
        if name == "seeds":
            continue
        kind = SettingParams if name == "settings" else type(getattr(Params(), name))
        assert list(keys) == [entry.name for entry in dataclasses.fields(kind)], name
        for entry in dataclasses.fields(kind):
            if entry.default is not dataclasses.MISSING and name != "settings":
                value = list(entry.default) if isinstance(entry.default, tuple) else entry.default
                shown = {None: "null", True: "true", False: "false"}.get(value) if not isinstance(value, list) else None
                assert keys[entry.name] in (shown or str(value), f"{value}"), f"{name}.{entry.name}"


@pytest.mark.parametrize("path", ["params.yaml", *sorted(p.name for p in (PROJECT / "presets").glob("*.yaml"))])
def test_every_params_file_of_the_project_is_valid(path: str) -> None:
    file = PROJECT / path if path == "params.yaml" else PROJECT / "presets" / path
    assert read_params(file).runs()


def test_presets_of_the_papers_size_add_the_noise_of_its_equation_2() -> None:
    presets = {path.stem: read_params(path) for path in (PROJECT / "presets").glob("*.yaml")}
    runs = [(name, run) for name, params in presets.items() if params.cluster.gpu for run in params.runs()]
    ancestral = [(name, run) for name, run in runs if run.sampling.solver == "ddpm" and run.sampling.steps >= 1000]
    names = {
        "cifar10-32",
        "fig4-celeba64",
        "bedroom-256",
        "church-256",
        "cat-256",
        "ffhq-256",
        "table2-ffhq1024",
        "table3-celeba128",
    }
    assert {name for name, _ in ancestral} == names
    assert {run.sampling.variance for _, run in ancestral} == {"fixed_large"}


PAPER_PRESETS = {
    "cifar10-32": 0, "bedroom-256": 0, "church-256": 0, "cat-256": 0, "ffhq-256": 0, "table2-ffhq1024": 1,
    "table3-celeba128": 2, "fig4-celeba64": 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "table"), PAPER_PRESETS.items())
def test_a_preset_of_the_paper_fills_cells_of_its_table_by_the_recipe_of_the_report(name: str, table: int) -> None:
    params = read_params(PROJECT / f"presets/{name}.yaml")
    assert params.evaluation.samples == TABLES[table].samples
    rows = {(row.process, row.turning_points): row for row in TABLES[table].rows if row.is_on(params.dataset.name)}
    for run in params.runs():
        row = rows.get((run.process, run.turning_points))
        assert row or (name, run.process) == ("fig4-celeba64", "ddpm"), "Fig. 4 has no DDPM"
        assert run.schedule == ScheduleParams()
        if row:
            assert row.resolution == run.resolution
            assert training_images(run) == row.training_images
            assert run.sampling.lift == row.lift


def test_a_preset_for_own_images_takes_what_the_studies_found_best() -> None:
    (ddpm, dvdp) = read_params(PROJECT / "presets/folder-256.yaml").runs()
    for run in (ddpm, dvdp):
        found = (run.model.prediction_type, run.training.optimizer, run.training.levels)
        assert found == ("v_prediction", "muon", "all")
        assert (run.sampling.solver, run.sampling.timestep_spacing, run.sampling.steps) == (
            "sde-dpm++2m",
            "quadratic",
            50,
        )


def test_links_between_documents_lead_somewhere() -> None:
    for document in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"), *(PROJECT / "presets").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_source_is_documented() -> None:
    documented = (PROJECT / "docs/data.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", documented, re.MULTILINE) == list(SOURCES)
    row = next(line for line in (PROJECT / "docs/params.md").read_text().splitlines() if line.startswith("| `source`"))
    assert all(f"`{name}`" in row for name in SOURCES)


def test_the_new_source_that_the_docs_show_can_be_prepared(tmp_path: Path) -> None:
    module, line = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/data.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(module, names)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    SOURCES.update(eval(f"{{{line}}}", names))
    try:
        params = DatasetParams(source="arrays", path=tmp_path / "images.npz", resolution=8)
        assert prepare(params, tmp_path / "store").count == 5
        np.testing.assert_array_equal([item.load() for item in SOURCES["arrays"](params.path)], images)
        np.save(tmp_path / "single.npy", images)
        (tmp_path / "short.npz").write_bytes((tmp_path / "images.npz").read_bytes()[:-30])
        for wrong in ("gone.npz", "single.npy", "short.npz"):
            with pytest.raises(UserError, match=r"cannot read .*, expected an \.npz file"):
                SOURCES["arrays"](tmp_path / wrong)
        with pytest.raises(UserError, match=r"path: found nothing, expected an \.npz file"):
            DatasetParams(source="arrays")
    finally:
        del SOURCES["arrays"]
    with pytest.raises(UserError, match="source: found 'arrays', expected one of digits, image_folder"):
        DatasetParams(source="arrays")
