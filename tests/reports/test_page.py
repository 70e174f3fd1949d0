"""The page of a comparison: what a person asks stands on it, on every screen and without a network."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dvdp.evaluation.intervals import Estimate
from pipelines.reports.comparison import Result, compare
from pipelines.reports.origin import Services
from pipelines.reports.page import verdict, write_report
from tests.reports.study import COMMIT, study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUNS = {f"{setting}-seed{seed}": ("7", "a" * 32) for setting in ("ddpm", "dvdp-600", "dvdp-300-600") for seed in (0, 1)}
ODD, LONG = "<script>alert(1)</script>", "a-setting-with-a-name-of-many-characters-" * 4
SERVERS = Services("http://me:secret@tracking:5000", RUNS, "http://flows:4200/api", "0f1e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of the study; the working directory for this module's tests. There is no MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("study")
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield place


@pytest.fixture(scope="module")
def results(folder: Path) -> list[Result]:
    """What came of the study."""
    return study(folder)


@pytest.fixture(scope="module")
def markup(folder: Path, results: list[Result]) -> str:
    """The page, with servers and two settings that failed."""
    failures = {ODD: ODD, LONG: "loss: found nan, " + "x" * 300}
    return write_report(folder / "page", compare(results), results, failures, SERVERS, "dvdp-digits").page.read_text()


def text(markup: str) -> str:
    """What a person reads."""
    return re.sub(r"\s+", " ", html.unescape(re.sub("<style>.*</style>|<[^>]*>", " ", markup, flags=re.DOTALL)))


def test_the_page_answers_what_a_person_asks(results: list[Result], markup: str) -> None:
    shown = text(markup)
    best, job = next(r for r in results if r.job.run.setting == "dvdp-300-600"), results[0].job
    # Which is best; what did it cost; from which data and commit.
    assert "No setting is certainly best. dvdp-300-600 has the lowest score, fd_labels 2.05 ± 0.64, but chance" in shown
    assert "Some images are copies of training images: dvdp-600-seed1, see there." in shown
    assert "dvdp-600-seed1. 64 of 256 samples are taken for copies of training images" in shown
    assert "ddpm-seed1. No sign of copies: 0 of 256 samples" in shown
    assert "All settings were trained on equal FLOPs, 11.5 TFLOPs each" in shown
    assert "6 runs took " in shown
    assert "core-minutes of training" in shown
    assert job.dataset_digest in shown
    assert COMMIT[:12] in shown
    assert all(result.job.training_hash in shown for result in results)
    for fact in ("Muon for matrices", "learning rate 0.002", "32 images a step", "795 k parameters", "AMD EPYC 9004"):
        assert fact in shown
    assert "dvdp 0.1.0, torch 2.11.0, Python 3.12.3" in shown
    # How do I get its images.
    assert (
        f"dvdp draw runs/{best.job.training_hash}/weights.safetensors --count 16 --label 0 --out samples.png" in shown
    )
    assert 'mlflow.pyfunc.load_model("models:/dvdp-digits@champion")' in shown


def test_the_verdict_says_how_certain_it_is(results: list[Result]) -> None:
    certain = compare([result for result in results if result.job.run.seed == 0])
    (line,) = verdict(certain, "fd_labels")
    assert line.startswith("dvdp-300-600 is best: its fd_labels 2.000 ± 0.098 is lower than every other's by more than")
    ties = verdict(compare(results), "fd_labels")
    assert ties[0].endswith("over ddpm (2.25 ± 0.64) and dvdp-600 (2.35 ± 0.64).")
    far = [
        dataclasses.replace(row, score=9.0, estimate=Estimate(9.0, 0.1)) if row.process == "ddpm" else row
        for row in compare(results)
    ]
    assert verdict(far, "fd_labels")[1] == "Its score is lower than that of ddpm by more than chance explains."
    other = [dataclasses.replace(row, same_terms=row.setting == "ddpm") for row in certain]
    assert verdict(other, "fd_labels") == [
        "ddpm has fd_labels 2.200 ± 0.098; there is no other setting to compare it with.",
        "Scored on other terms, and not compared: dvdp-600, dvdp-300-600.",
    ]


def test_links_land_on_the_runs_and_carry_no_password(results: list[Result], markup: str) -> None:
    links = re.findall(r'href="([^"]*)"', markup)
    assert links.count(f"http://tracking:5000/#/experiments/7/runs/{'a' * 32}") == len(results)
    assert "http://flows:4200/runs/flow-run/0f1e" in links
    assert all(link.startswith(("#", "http://tracking:5000/#/", "http://flows:4200/runs/")) for link in links)
    assert "secret" not in markup


def test_the_page_needs_no_network_and_without_servers_says_how_to_start_them(
    results: list[Result], tmp_path: Path
) -> None:
    services = Services("sqlite:////here/mlflow.db", RUNS, flow_run="0f1e")
    markup = write_report(tmp_path, compare(results), results, {}, services, "dvdp-digits").page.read_text()
    assert set(re.findall(r"""(?:src|srcset|href)=["']?([^#"'].{9})""", markup)) == {"data:image"}
    assert not re.search(r"//|url\(|@import", re.sub(r"base64,[^\"]*|http://127.0.0.1:[0-9]*[^ <]*", "", markup))
    assert "make ui, then open http://127.0.0.1:5000/#/experiments/7/runs" in markup
    assert "flow run 0f1e; make services, then open http://127.0.0.1:4200" in markup


def test_the_page_says_where_the_bits_are(results: list[Result], markup: str, tmp_path: Path) -> None:
    assert "Where the bits are" not in markup
    bits = {"bits_per_dim": 3.5, "bits_per_dim_error": 0.05, "bits_per_dim_images": 64.0, "bits_per_dim_decoder": 2.125}
    record = results[0].record
    bounded = [dataclasses.replace(results[0], record=dataclasses.replace(record, metrics={**record.metrics, **bits}))]
    report = write_report(tmp_path, compare(bounded), bounded, {}, SERVERS, "dvdp-digits")
    shown = text(report.page.read_text())
    assert "Where the bits are" in shown
    assert "bits / dim ↓" in report.text
    assert shown.count("3.500 ± 0.098") == 2
    assert "2.1250" in shown
    assert json.loads((tmp_path / "metrics.json").read_text())["ddpm"]["bits_per_dim"] == 3.5


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.usefixtures("markup")
@pytest.mark.parametrize("width", [400, 1400])
def test_no_element_is_wider_than_the_screen_and_no_text_is_small(folder: Path, tmp_path: Path, width: int) -> None:
    # A window cannot be as narrow as a phone; a frame can.
    (folder / "page" / f"{width}.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--dump-dom",
        f"file://{folder}/page/{width}.html",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads(html.unescape(re.findall('<pre id="found">(.*?)</pre>', dom, re.DOTALL)[0]))
    assert found["elements"] > 300
    assert (found["width"], found["scroll"]) == (width, width)
    assert found["wide"] == []
    assert found["small"] == []


#: Opens the page, unfolds all of it and looks at every element that is seen.
FRAME = """<iframe id="frame" src="index.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
<pre id="found"></pre><script>
frame.onload = () => {
  const page = frame.contentDocument, style = e => frame.contentWindow.getComputedStyle(e)
  page.querySelectorAll("details").forEach(e => e.open = true)
  const all = [...page.body.querySelectorAll("*")].filter(e => e.getClientRects().length)
  const scrolls = e => e && (style(e).overflowX == "auto" || scrolls(e.parentElement))
  const named = those => those.map(e => e.outerHTML.slice(0, 90))
  found.textContent = JSON.stringify({
    width: page.documentElement.clientWidth, scroll: page.documentElement.scrollWidth, elements: all.length,
    wide: named(all.filter(e => e.getBoundingClientRect().right > WIDTH + 1 && !scrolls(e))),
    small: named(all.filter(e => parseFloat(style(e).fontSize) < 15)) })
}</script>"""


def test_names_that_are_markup_are_text(markup: str) -> None:
    assert "<script" not in markup
    assert html.unescape(markup).count(ODD) == 2
