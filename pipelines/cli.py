"""Every step of the pipeline by itself, and the whole experiment."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import typer
from typer import Argument, Option

from dvdp.errors import UserError
from dvdp.text import utf8
from pipelines.environment import (
    check_folder,
    check_prefect,
    find_home,
    open_standard_streams,
    reach_loopback_directly,
)
from pipelines.logs import to_terminal
from pipelines.provenance import keep_in_project

if TYPE_CHECKING:
    from dvdp.config import Params
    from pipelines.commands.evaluate import RegisteredModel
    from pipelines.jobs.job import Job

#: Quiet libraries; said before any of them is imported.
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # As the server of `make services` keeps them, whose slots a temporary one may give back.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


#: What ends a command in order: Ctrl-C, the system's word, a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = "dvdp: interrupted; what is finished is kept, and the same command goes on from there."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 for a failed experiment, 2 for a mistake in what we were given, 128 + n after signal n:
        Ctrl-C, a closed terminal, or the system's word to end.
    """
    open_standard_streams()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    reach_loopback_directly()
    to_terminal()
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not so below nohup
                signal.signal(number, _interrupt)
    # Remarks on a score are in its record, and shown with it.
    warnings.filterwarnings("ignore", category=UserWarning, module="pipelines")
    command = typer.main.get_command(app)
    try:
        check_folder()
        keep_in_project(".services", "mlflow.db")
        find_home()
        # The place where `make services` looks, so that its page shows runs made without it.
        os.environ.setdefault("PREFECT_HOME", str(Path(".services/prefect").resolve()))
        with command.make_context("dvdp", list(sys.argv[1:] if arguments is None else arguments)) as context:
            return command.invoke(context) or 0
    except typer.Exit as done:
        return done.exit_code
    except UserError as error:
        print(f"dvdp: {error}", file=sys.stderr)
        return 2
    except typer.TyperException as error:
        print(f"dvdp: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return _leave(interrupt.args[0] if interrupt.args else signal.SIGINT)


def _sentence(error: typer.TyperException) -> str:
    """What Typer says of a mistake in a command line."""
    context = getattr(error, "ctx", None)
    text = re.sub(r"\. Did you mean (.*)\?$", r" (did you mean \1?)", error.format_message().rstrip("."))
    return f"{text}; see `{context.command_path if context else 'dvdp'} --help`."


def _read(file: str, changes: Sequence[str], services: bool = False) -> Params:
    """The params; with ``services`` MLflow and Prefect are those of this project folder, unless others are named."""
    from dvdp.config import check_says_every_key, parse_overrides, read_params
    from pipelines.addresses import PREFECT_SECRET, services_environment

    params = read_params(file, parse_overrides(changes))
    keep_in_project(params.cluster.storage)
    if "DVC_STAGE" in os.environ:
        check_says_every_key(file)
    found = services_environment(Path()) if services else {}
    if os.environ.get("PREFECT_API_URL", found.get("PREFECT_API_URL")) != found.get("PREFECT_API_URL"):
        found.pop(PREFECT_SECRET, None)  # Another server must not be told it.
    for name, value in found.items():
        os.environ.setdefault(name, value)
    return params


#: Once a command has said that it was interrupted.
_left = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _leave(number: int) -> int:
    """End what still runs for this command, and say so; the exit status."""
    import psutil

    from pipelines.left_behind import end_processes

    end_processes(psutil.Process().children(recursive=True), patience=3)
    with contextlib.suppress(OSError):  # The terminal may be closed.
        sys.stdout.flush()
        print(INTERRUPTED, file=sys.stderr, flush=True)
    _left.set()
    return 128 + number


def _end_soon_after_a_signal(seconds: float) -> None:
    """Let a signal end this process after so many seconds, if it has not ended by itself.

    A temporary Prefect server hears Ctrl-C too, and Prefect tries for minutes to tell it what happened. Whoever handles
    the signal, as Prefect does while a flow runs, the system tells us here.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        while (number := os.read(heard, 1)[0]) not in SIGNALS:
            pass
        if _left.wait(seconds):
            time.sleep(2)  # Python waits for threads that nobody needs any more.
        else:
            _leave(number)
        os._exit(128 + number)

    threading.Thread(target=listen, name="signals", daemon=True).start()


app = typer.Typer(help=__doc__, add_completion=False)
PARAMS, DATA, RUNS, EXPERIMENTS = "Params", "Data", "Runs, step by step", "Whole experiments"
MODELS = "Registered models"
FILE = Option("params.yaml", "--params", metavar="FILE", help="The params file.")
CHANGES = Option([], "-S", "--set-param", metavar="KEY=VALUE", help="Another value, such as training.batch=64.")
SETTING = Option(None, metavar="NAME", help="One setting alone.")
SEED = Option(None, help="One seed alone.")
NAME = Argument(metavar="MODEL", help="Its name in MLflow, such as dvdp-digits.")
MODEL = Option(None, metavar="ADDRESS", help="A registered model in place of settings, models:/NAME@ALIAS or /VERSION.")


@app.command(rich_help_panel=PARAMS)
def check(
    file: str = FILE,
    changes: list[str] = CHANGES,
    gpu: str | None = Option(None, metavar="NAME", help="On this GPU in place of this machine, such as A100-80GB."),
    price: float | None = Option(None, min=0, help="Of an hour of one worker's device."),
    trial: bool = Option(False, "--trial", help="Time a few steps of each setting on this machine, and keep that."),
) -> None:
    """Read the params and say what each setting will take, and what does not fit; trains nothing."""
    params = _read(file, changes)
    from pipelines.commands.check import check

    print(check(params, gpu, price, trial))


@app.command("params", rich_help_panel=PARAMS)
def print_params(
    file: str = FILE,
    changes: list[str] = CHANGES,
    out: str | None = Option(None, metavar="FILE", help="Write them to a file, such as params.yaml."),
) -> None:
    """Print the params with every key, as `dvc repro` needs them in params.yaml: those of a preset, or with changes."""
    from dvdp.files import write_atomically
    from dvdp.yaml_files import dump_yaml

    text = dump_yaml(_read(file, changes).describe())
    if out is None:
        print(text, end="")
    else:
        write_atomically(_file("--out", out), text)


@app.command(rich_help_panel=PARAMS)
def plan(
    file: str = FILE,
    changes: list[str] = CHANGES,
    steps: int | None = Option(None, metavar="N", help="NFE of an image, not sampling.steps."),
    solver: str | None = Option(None, help="Not sampling.solver."),
    tolerance: float = Option(0.01, metavar="X", help="Error added to DDPM's, at most."),
    levels: int | None = Option(None, metavar="K", help="Turning points, at most; else as many as fit."),
    seconds: list[float] = Option(
        [], metavar="S ...", help="Measured of the network at each level, finest first; else FLOPs are counted."
    ),
    more: list[float] = Argument([], hidden=True, help="The seconds after the first."),
    fisher: str | None = Option(None, metavar="WEIGHTS", help="Print its orthogonal Fisher divergences as well."),
    out: str = Option("plan.png", metavar="FILE", help="The picture, a .png."),
) -> None:
    """Say what turning points cost and lose, before any training, and choose some."""
    picture, params = _picture(out), _read(file, changes, services=True)
    from pipelines.commands.plan import Question, plan, print_divergences

    times = (*seconds, *more)
    plan(params, Question(steps, solver, tolerance, levels, times or None), picture)
    if fisher:
        print()
        print_divergences(params, Path(fisher))


@app.command(rich_help_panel=DATA)
def prepare(file: str = FILE, changes: list[str] = CHANGES) -> None:
    """Turn raw images into LMDB (DVC stage)."""
    from pipelines.stages import prepare_data

    prepare_data(_read(file, changes))


@app.command(rich_help_panel=DATA)
def verify(file: str = FILE, changes: list[str] = CHANGES) -> None:
    """Check every prepared image against its digest, and name the damaged ones."""
    from pipelines.stages import verify_data

    print(verify_data(_read(file, changes)))


@app.command(rich_help_panel=DATA)
def stats(
    file: str = FILE,
    changes: list[str] = CHANGES,
    out: str = Option("contact_sheet.png", metavar="FILE", help="The picture, a .png."),
) -> None:
    """Say what the prepared data set is, in numbers and as a picture."""
    from pipelines.stages import data_sheet, describe_data

    params, picture = _read(file, changes), _picture(out)
    print(describe_data(params))
    print(data_sheet(params, picture))


@app.command(rich_help_panel=DATA)
def extractor(file: str = FILE, changes: list[str] = CHANGES) -> None:
    """Train the network that scores are made with (DVC stage)."""
    from pipelines.stages import make_extractor

    make_extractor(_read(file, changes))


@app.command(rich_help_panel=DATA)
def reference(
    file: str = FILE,
    changes: list[str] = CHANGES,
    export: str | None = Option(
        None, metavar="FILE", help="Write mean and covariance to an .npz, as others read them, and compute nothing."
    ),
) -> None:
    """Compute the features of the real images (DVC stage)."""
    from pipelines.stages import export_references, make_references

    params = _read(file, changes)
    if export is not None:
        export_references(params, _file("--export", export))
    else:
        make_references(params)


@app.command(rich_help_panel=RUNS)
def train(
    file: str = FILE,
    changes: list[str] = CHANGES,
    setting: str | None = SETTING,
    seed: int | None = SEED,
    resume: bool = Option(False, "--resume", help="Fail unless there is a checkpoint to go on from."),
) -> None:
    """Train settings, going on where they stopped."""
    params = _read(file, changes, services=True)
    from pipelines.commands.runs import chosen, train

    train(params, chosen(params, setting, seed), resume)


@app.command(rich_help_panel=RUNS)
def sample(
    file: str = FILE,
    changes: list[str] = CHANGES,
    setting: str | None = SETTING,
    seed: int | None = SEED,
    model: str | None = MODEL,
    out: str | None = Option(None, metavar="FOLDER", help="Of PNG files, one an image; an interrupted run goes on."),
) -> None:
    """Draw the sampling.count images of trained settings, or of a registered model."""
    subjects = _subjects(params := _read(file, changes, services=True), setting, seed, model)
    from pipelines.commands.runs import sample

    for subject, folder in zip(subjects, sample(params, subjects, None if out is None else Path(out)), strict=True):
        print(f"{subject.name}: {folder}")


@app.command(rich_help_panel=RUNS)
def serve(
    file: str = FILE,
    changes: list[str] = CHANGES,
    model: str | None = Option(None, metavar="ADDRESS", help="models:/NAME@ALIAS or /VERSION; else the champion."),
    port: int = Option(8000, min=1, max=65535, help="On this machine only."),
) -> None:
    """Serve a page to draw images from a registered model."""
    params = _read(file, changes, services=True)
    from pipelines.commands.serve import serve

    serve(params, model, port)


@app.command(rich_help_panel=RUNS)
def evaluate(
    file: str = FILE,
    changes: list[str] = CHANGES,
    setting: str | None = SETTING,
    seed: int | None = SEED,
    model: str | None = MODEL,
    statistics: str | None = Option(
        None, metavar="FILE", help="An .npz with published 'mu' and 'sigma' in place of the reference: FID alone."
    ),
) -> None:
    """Score the images of settings, or a registered model, and add that to MLflow."""
    subjects = _subjects(_read(file, changes, services=True), setting, seed, model)
    from pipelines.commands.evaluate import evaluate, track

    problems: list[str] = []
    for subject in subjects:
        record = evaluate(subject, Path(statistics) if statistics else None)
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
        print("\n".join([f"{subject.name}: {metrics}", *(f"Note: {remark}" for remark in record.warnings)]))
        problems += _unavailable(partial(track, subject, record))
    print("".join(f"dvdp: {problem}\n" for problem in problems[-1:]), end="", file=sys.stderr)


@app.command(rich_help_panel=RUNS)
def audit(
    file: str = FILE,
    changes: list[str] = CHANGES,
    setting: str | None = SETTING,
    seed: int | None = SEED,
    images: int | None = Option(None, metavar="N", help="Behind every score; else evaluation.samples."),
    solver_steps: int | None = Option(
        None, metavar="N", help="Ancestral steps to compare with; else sampling.steps, and at least 250."
    ),
) -> None:
    """Say which level, lift or the solver costs trained settings their score."""
    params = _read(file, changes, services=True)
    from pipelines.commands.audit import summary, track
    from pipelines.commands.runs import chosen
    from pipelines.jobs.audit import audit_jobs, plan
    from pipelines.jobs.likelihood import known_likelihood

    audits = [plan(job, images, solver_steps) for job in chosen(params, setting, seed)]
    problems: list[str] = []
    for one, result in zip(audits, audit_jobs(audits), strict=True):
        print(f"{summary(result, one.job.name, known_likelihood(one.job))}\n\nChart: {one.chart}\n")
        problems += _unavailable(partial(track, one, result))
    print("".join(f"dvdp: {problem}\n" for problem in problems[-1:]), end="", file=sys.stderr)


@app.command(rich_help_panel=RUNS)
def draw(
    weights: str = Argument(help="weights.safetensors of a finished run."),
    count: int = 64,
    seed: int | None = None,
    steps: int | None = None,
    solver: str | None = None,
    label: str | None = Option(None, help="Class to draw, of a class-conditional model; else each image its own."),
    guidance: list[float] = Option(
        [], metavar="SCALE", help="Not sampling.guidance_scale; once, or once a level, finest first."
    ),
    image: str | None = Option(None, metavar="FILE", help="A picture that is given; one of the next four says how."),
    mask: str | None = Option(None, metavar="FILE", help="Of its size: what is white in it is drawn anew."),
    upscale: int | None = Option(None, metavar="N", help="It is N times smaller than what is drawn; a power of 2."),
    strength: float | None = Option(None, metavar="X", help="Start from it, the more changed the nearer X is to 1."),
    colourise: bool = Option(False, "--colourise", help="Keep its brightness alone."),
    resampling: int | None = Option(None, metavar="N", help="Make each step N times; 5 with a mask."),
    device: Literal["cpu", "cuda"] = "cpu",
    out: str = Option("samples.png", metavar="FILE", help="The picture, a .png."),
) -> None:
    """Draw images from a weights file as one picture."""
    picture = _picture(out)
    from pipelines.commands.runs import draw

    scale = guidance[0] if len(guidance) == 1 else guidance or None
    request = {
        "image": image and Path(image), "mask": mask and Path(mask), "upscale": upscale, "strength": strength,
        "colourise": colourise, "resampling": resampling,
    }  # fmt: skip
    how = {"seed": seed, "steps": steps, "solver": solver, "label": label, "guidance": scale}
    draw(weights, count, device, picture, request, **how)


@app.command("import", rich_help_panel=RUNS)
def import_weights(
    source: str = Argument(help="A checkpoint of guided-diffusion, or a folder of diffusers' UNet2DModel."),
    arguments: str | None = Option(None, metavar="FILE", help="YAML with what the source does not say of itself."),
    out: str = Option("weights.safetensors", metavar="FILE", help="The model file."),
) -> None:
    """Turn weights of another library into a model file, where the architecture is the same."""
    path = _file("--out", out)
    from pipelines.commands.imports import import_weights

    print(import_weights(Path(source), None if arguments is None else Path(arguments), path))


@app.command(rich_help_panel=EXPERIMENTS)
def clean(
    file: str = FILE,
    changes: list[str] = CHANGES,
    keep: list[str] = Option([], metavar="KIND", help="Leave checkpoints, samples, versions or artifacts alone."),
    days: int = Option(30, min=0, help="Age at which an artifact in Prefect goes."),
    yes: bool = Option(False, "--yes", help="Remove it; else it is listed alone."),
) -> None:
    """List, or remove, what finished runs left and nobody needs: docs/results.md."""
    params = _read(file, changes, services=True)
    from pipelines.commands.clean import clean

    print(clean(params, keep, days, yes))


@app.command("experiment", rich_help_panel=EXPERIMENTS)
def run_experiment(
    file: str = FILE,
    changes: list[str] = CHANGES,
    reports: str | None = Option(
        None, metavar="FOLDER", help="Of the report; without it, beside the runs, and data must be as in dvc.lock."
    ),
) -> int:
    """Train, sample, score, register and compare every setting."""
    for what, text in (("--params", file), ("--reports", reports or ""), ("project folder", str(Path.cwd()))):
        if text != utf8(text):
            raise UserError(f"{what}: found '{text}', expected a name in UTF-8, as Prefect keeps it; rename it.")
    # Mistakes are found before a Prefect server is started for the flow, which checks again.
    params = _read(file, changes, services=True)
    from dvdp.config import parse_overrides
    from pipelines.jobs.cluster import check_address, check_storage, ray_folder
    from pipelines.jobs.job import jobs
    from pipelines.jobs.paths import DataPaths
    from pipelines.jobs.score import check_scorable
    from pipelines.provenance import check_data_is_locked
    from pipelines.starts import fetch_starts
    from pipelines.turning_points import resolve

    listed = jobs(resolve(fetch_starts(params)))
    check_scorable(params)
    if reports is None:
        check_data_is_locked(DataPaths.of(params).store)
    check_address()
    ray_folder()
    check_storage(params.cluster.storage)
    check_prefect()
    from pipelines.tracking.job_runs import check_tracking

    check_tracking(listed[0])
    from pipelines.left_behind import end_orphans, mark_children

    end_orphans()
    mark_children()
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    from pipelines.prefect_server import guard_temporary_server

    guard_temporary_server()
    from pipelines.experiment import experiment

    _end_soon_after_a_signal(15)
    state = experiment(params_file=file, reports=reports, overrides=parse_overrides(changes), return_state=True)
    if state.is_completed():
        return 0
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, UserError):
        raise outcome
    print(f"dvdp: {state.message}", file=sys.stderr)
    return 1


@app.command(rich_help_panel=EXPERIMENTS)
def report(
    file: str = FILE,
    changes: list[str] = CHANGES,
    out: str = Option("reports/paper", metavar="FOLDER", help="Where they go."),
) -> None:
    """Write the paper's tables with its numbers and ours side by side, from MLflow."""
    params, folder = _read(file, changes, services=True), _file("--out", f"{out}/tables.html").parent
    from pipelines.reports.paper_page import write_tables
    from pipelines.tracking.connection import answering

    with answering("holds our scores"):
        written = write_tables(params, folder)
    print("\n".join([written.found, *map(str, written.files)]))


@app.command(rich_help_panel=MODELS)
def promote(
    model: str = NAME,
    version: int | None = Argument(None, help="The version to use from now on, until it is released with --auto."),
    auto: bool = Option(False, "--auto", help="Let the scores choose the champion again, now and after each run."),
    file: str = FILE,
    changes: list[str] = CHANGES,
) -> None:
    """Say which version of a registered model is champion, or let the scores say so again."""
    if auto == (version is not None):
        raise UserError(
            f"VERSION: found {'--auto beside it' if auto else 'none and no --auto'}, expected one of them; give the"
            " number of a version, or --auto to let the scores choose."
        )
    params = _read(file, changes, services=True)
    from pipelines.commands.versions import promote

    print(promote(params, model, version))


@app.command(rich_help_panel=MODELS)
def rollback(model: str = NAME, file: str = FILE, changes: list[str] = CHANGES) -> None:
    """Make the version with the alias `previous` champion again."""
    _read(file, changes, services=True)
    from pipelines.commands.versions import rollback

    print(rollback(model))


@app.command(rich_help_panel=MODELS)
def reject(
    model: str = NAME,
    version: int = Argument(help="The version that is never to be promoted again."),
    reason: str = Option(..., metavar="TEXT", help="Why; MLflow shows it as a tag of the version."),
    file: str = FILE,
    changes: list[str] = CHANGES,
) -> None:
    """Never promote a version again; if it is champion, go back to the one before."""
    _read(file, changes, services=True)
    from pipelines.commands.versions import reject

    print(reject(model, version, reason))


def _picture(name: str) -> Path:
    if Path(name).suffix.lower() != ".png":
        raise UserError(f"--out: found '{name}', expected a name that ends in .png.")
    return _file("--out", name)


def _file(option: str, name: str) -> Path:
    """A file that can be written, which is found out before any work."""
    path = Path(name)
    with contextlib.suppress(OSError):
        there = next(parent for parent in path.absolute().parents if parent.exists())
        # Written aside first, under a longer name.
        if path.name and not path.is_dir() and not path.with_name(f".{path.name}.{os.getpid()}.part").exists():
            with tempfile.TemporaryFile(dir=there):
                return path
    raise UserError(f"{option}: found '{name}', expected the name of a file in a folder that can be written.")


def _subjects(
    params: Params, setting: str | None, seed: int | None, model: str | None
) -> Sequence[Job | RegisteredModel]:
    """The jobs of settings, or a registered model."""
    if model and (setting or seed is not None):
        raise UserError("--model: found it beside --setting or --seed, expected one or the other; leave one out.")
    # Seconds to import.
    from pipelines.commands.evaluate import registered_model
    from pipelines.commands.runs import chosen

    return [registered_model(params, model)] if model else chosen(params, setting, seed)


def _unavailable(work: Callable[[], None]) -> list[str]:
    """Do what needs MLflow; why it does not take it, if so."""
    from pipelines.tracking.connection import TrackingUnavailable

    try:
        work()
    except (TrackingUnavailable, UserError) as problem:
        return [str(problem)]
    return []


if __name__ == "__main__":
    sys.exit(main())
