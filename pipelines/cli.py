"""The ``dvdp`` command: every step of the pipeline by itself, and the whole experiment."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from dvdp.config import Params, read_params
from dvdp.errors import UserError

#: Quiet libraries; said before any of them is imported.
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # The place where `make services` looks, so that its page shows runs made without it.
    "PREFECT_HOME": str(Path(".services/prefect").resolve()),
}


INTERRUPTED = "dvdp: interrupted; what is finished is kept, and the same command goes on from there."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 for a failed experiment, 2 for a mistake in what we were given, 130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Remarks on a score are in its record, and shown with it.
    warnings.filterwarnings("ignore", category=UserWarning, module="pipelines")
    try:
        if options.command in (_train, _sample, _evaluate, _audit, _plan, _experiment, _report):
            _use_services()
        return options.command(options) or 0
    except UserError as error:
        print(f"dvdp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


def _use_services() -> None:
    """Let MLflow and Prefect be those of this project folder, where they are up and no others are named."""
    from pipelines.addresses import services_environment

    for name, value in services_environment(Path()).items():
        os.environ.setdefault(name, value)


def _end_soon_after_interrupt(seconds: float) -> None:
    """Let Ctrl-C end this process after so many seconds, if it has not ended by itself.

    A temporary Prefect server hears Ctrl-C too, and Prefect tries for minutes to tell it what happened.
    """

    def leave() -> None:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)

    def interrupted(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(seconds, leave)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dvdp", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int | None], help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_, allow_abbrev=False)
        sub.add_argument("--params", default="params.yaml", metavar="FILE", help="default: params.yaml")
        sub.set_defaults(command=command)
        return sub

    add("check", _check, "Read the params and say what each setting will cost; runs nothing.")
    add("prepare", _prepare, "Turn raw images into LMDB (DVC stage).")
    add("verify", _verify, "Check every prepared image against its digest, and name the damaged ones.")
    stats = add("stats", _stats, "Say what the prepared data set is, in numbers and as a picture.")
    stats.add_argument(
        "--out", default="contact_sheet.png", metavar="FILE", help="the picture, a .png; default: contact_sheet.png"
    )
    add("extractor", _extractor, "Train the network that scores are made with (DVC stage).")
    reference = add("reference", _reference, "Compute the features of the real images (DVC stage).")
    reference.add_argument(
        "--export",
        metavar="FILE",
        help="an .npz to write the mean and covariance of the features to, as others read them; computes nothing",
    )

    for name, command, help_ in (
        ("train", _train, "Train settings, going on where they stopped."),
        ("sample", _sample, "Draw the images of trained settings that scores need."),
        ("evaluate", _evaluate, "Score the images of settings, or a registered model, and add that to MLflow."),
        ("audit", _audit, "Say which level, lift or the solver costs trained settings their score."),
    ):
        sub = add(name, command, help_)
        sub.add_argument("--setting", metavar="NAME", help="one setting; default: all")
        sub.add_argument("--seed", type=int, help="one seed; default: all")
        if name == "train":
            sub.add_argument("--resume", action="store_true", help="fail unless there is a checkpoint to go on from")
        if name == "evaluate":
            sub.add_argument(
                "--model",
                metavar="ADDRESS",
                help="a registered model to sample and score in place of settings, models:/NAME@ALIAS or /VERSION",
            )
            sub.add_argument(
                "--statistics",
                metavar="FILE",
                help="an .npz with 'mu' and 'sigma' that others publish, to score against in place of the reference:"
                " the Frechet distance alone",
            )
        if name == "audit":
            sub.add_argument("--images", type=int, metavar="N", help="behind every score; default: evaluation.samples")
            sub.add_argument(
                "--solver-steps",
                type=int,
                metavar="N",
                help="ancestral steps the solver is compared with; default: sampling.steps, and at least 250",
            )

    plan = add("plan", _plan, "Say what turning points cost and lose, before any training, and choose some.")
    plan.add_argument("--steps", type=int, metavar="N", help="network evaluations an image; default: sampling.steps")
    plan.add_argument("--solver", help="default: sampling.solver")
    plan.add_argument(
        "--tolerance", type=float, default=0.01, metavar="X", help="error added to DDPM's, at most; default: 0.01"
    )
    plan.add_argument(
        "--levels", type=int, metavar="K", help="turning points, at most; default: what resolution and network allow"
    )
    plan.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        metavar="S",
        help="of the network at each level, finest first (benchmarks/steps.py measures them); default: counted FLOPs",
    )
    plan.add_argument("--fisher", metavar="WEIGHTS", help="print this network's orthogonal Fisher divergences as well")
    plan.add_argument("--out", default="plan.png", metavar="FILE", help="the picture, a .png; default: plan.png")

    experiment = add("experiment", _experiment, "Train, sample, score, register and compare every setting.")
    experiment.add_argument(
        "--reports",
        metavar="FOLDER",
        help="where the report goes; without it, data must be as in dvc.lock, not prepared by hand, and the report goes"
        " beside the runs",
    )

    report = add("report", _report, "Write the paper's tables with its numbers and ours side by side, from MLflow.")
    report.add_argument("--out", default="reports/paper", metavar="FOLDER", help="default: reports/paper")

    draw = commands.add_parser("draw", help="Draw images from a weights file as one picture.", allow_abbrev=False)
    draw.add_argument("weights", metavar="WEIGHTS", help="weights.safetensors of a finished run")
    draw.add_argument("--count", type=int, default=64)
    draw.add_argument("--seed", type=int)
    draw.add_argument("--steps", type=int)
    draw.add_argument("--solver")
    draw.add_argument("--label", help="class to draw, of a class-conditional model; default: each image its own")
    draw.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    draw.add_argument("--out", default="samples.png", metavar="FILE", help="a .png")
    draw.set_defaults(command=_draw)
    return parser


def _picture(name: str) -> Path:
    if Path(name).suffix.lower() != ".png":
        raise UserError(f"--out: found '{name}', expected a name that ends in .png.")
    return Path(name)


def _check(options: argparse.Namespace) -> None:
    from dvdp.models.flops import mean_flops, relative_flops, training_images

    params = read_params(options.params)
    for run in params.runs():
        images = training_images(run)
        print(
            f"{run.setting} seed {run.seed}: {images:,} training images, {3 * images * mean_flops(run):.2e} FLOPs,"
            f" {1 / relative_flops(run):.2f}x cheaper an image than DDPM"
        )
    for setting in params.settings:
        if isinstance(setting.turning_points, str):
            print(f"{setting.name}: its turning points are chosen once the data set is prepared, see `dvdp plan`")


def _prepare(options: argparse.Namespace) -> None:
    from pipelines.stages import prepare_data

    prepare_data(read_params(options.params))


def _verify(options: argparse.Namespace) -> None:
    from pipelines.stages import verify_data

    print(verify_data(read_params(options.params)))


def _stats(options: argparse.Namespace) -> None:
    from pipelines.stages import data_sheet, describe_data

    params, out = read_params(options.params), _picture(options.out)
    print(describe_data(params))
    print(data_sheet(params, out))


def _extractor(options: argparse.Namespace) -> None:
    from pipelines.stages import make_extractor

    make_extractor(read_params(options.params))


def _reference(options: argparse.Namespace) -> None:
    from pipelines.stages import export_references, make_references

    params = read_params(options.params)
    if options.export:
        export_references(params, Path(options.export))
    else:
        make_references(params)


def _train(options: argparse.Namespace) -> None:
    from dvdp.training import checkpoints
    from dvdp.training.loop import is_finished
    from pipelines.jobs.cluster import cluster
    from pipelines.jobs.train import train_job

    params, chosen = _chosen(options)
    for job in chosen:
        if not is_finished(job.folder):
            found = checkpoints.find(job.folder / "checkpoints")
            if found:
                checkpoints.read(found[-1], job.training_hash)
            elif options.resume:
                raise UserError(
                    f"--resume: found no checkpoint of {job.name} in '{job.folder}', expected one;"
                    " leave out --resume to start, or give the params that the run was started with."
                )
    with cluster(params.cluster):
        for job in chosen:
            print(f"{job.name}: {train_job(job, {'dataset': params.dataset.name})}")


def _sample(options: argparse.Namespace) -> None:
    from dvdp.training.loop import is_finished
    from pipelines.jobs.cluster import cluster
    from pipelines.jobs.sample import sample_job

    params, chosen = _chosen(options)
    for job in chosen:
        if not is_finished(job.folder):
            raise UserError(
                f"sample: found no weights of {job.name} in '{job.folder}', expected a finished run;"
                " run `dvdp train` with the same params first."
            )
    with cluster(params.cluster) as slots, slots:
        for job in chosen:
            print(f"{job.name}: {sample_job(job, slots)}")


def _evaluate(options: argparse.Namespace) -> None:
    if options.model and (options.setting or options.seed is not None):
        raise UserError("--model: found it beside --setting or --seed, expected one or the other; leave one out.")
    params = read_params(options.params)
    # Seconds to import.
    from pipelines.commands.evaluate import evaluate, registered_model, track

    subjects = [registered_model(params, options.model)] if options.model else _chosen(options)[1]
    with _unavailability_reported_once() as attempt:
        for subject in subjects:
            record = evaluate(subject, Path(options.statistics) if options.statistics else None)
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
            print("\n".join([f"{subject.name}: {metrics}", *(f"Note: {remark}" for remark in record.warnings)]))
            attempt(partial(track, subject, record))


def _audit(options: argparse.Namespace) -> None:
    from pipelines.commands.audit import summary, track
    from pipelines.jobs.audit import audit_jobs, plan

    _, chosen = _chosen(options)
    audits = [plan(job, options.images, options.solver_steps) for job in chosen]
    with _unavailability_reported_once() as attempt:
        for audit, result in zip(audits, audit_jobs(audits), strict=True):
            print(f"{summary(result, audit.job.name)}\n\nChart: {audit.chart}\n")
            attempt(partial(track, audit, result))


@contextlib.contextmanager
def _unavailability_reported_once() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Gives a function that calls another, and tells at the end, once, what MLflow has not got as it is unavailable."""
    from pipelines.tracking.connection import TrackingUnavailable

    unavailable = ""

    def attempt(work: Callable[[], None]) -> None:
        nonlocal unavailable
        try:
            work()
        except TrackingUnavailable as problem:
            unavailable = str(problem)

    yield attempt
    if unavailable:
        print(f"dvdp: {unavailable}", file=sys.stderr)


def _chosen(options: argparse.Namespace) -> tuple[Params, list]:
    from pipelines.jobs.job import jobs
    from pipelines.turning_points import resolve

    params = read_params(options.params)
    chosen = [
        job
        for job in jobs(resolve(params))
        if options.setting in (None, job.run.setting) and options.seed in (None, job.run.seed)
    ]
    if not chosen:
        names = ", ".join(setting.name for setting in params.settings)
        raise UserError(
            f"--setting, --seed: found no such run, expected a setting of {names} and a seed of {list(params.seeds)}."
        )
    return params, chosen


def _plan(options: argparse.Namespace) -> None:
    from pipelines.commands.plan import Question, plan, print_divergences

    params, out = read_params(options.params), _picture(options.out)
    seconds = tuple(options.seconds) if options.seconds else None
    question = Question(options.steps, options.solver, options.tolerance, options.levels, seconds)
    plan(params, question, out)
    if options.fisher:
        print()
        print_divergences(params, Path(options.fisher))


def _experiment(options: argparse.Namespace) -> int:
    from pipelines.jobs.cluster import check_address
    from pipelines.jobs.job import jobs
    from pipelines.jobs.paths import DataPaths
    from pipelines.jobs.score import check_scorable
    from pipelines.provenance import check_data_is_locked
    from pipelines.turning_points import resolve

    # Mistakes are found before a Prefect server is started for the flow, which checks again.
    params = read_params(options.params)
    jobs(resolve(params))
    check_scorable(params)
    if options.reports is None:
        check_data_is_locked(DataPaths.of(params).store)
    check_address()
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    from pipelines.experiment import experiment

    _end_soon_after_interrupt(15)
    state = experiment(params_file=options.params, reports=options.reports, return_state=True)
    if state.is_completed():
        return 0
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, UserError):
        raise outcome
    print(f"dvdp: {state.message}", file=sys.stderr)
    return 1


def _report(options: argparse.Namespace) -> None:
    from pipelines.reports.paper_page import write_tables
    from pipelines.tracking.connection import TrackingUnavailable

    try:
        report = write_tables(read_params(options.params), Path(options.out))
    except TrackingUnavailable:
        raise UserError(
            "MLFLOW_TRACKING_URI: found no answer from MLflow there, which holds our scores, expected a server that"
            " runs; start it, or unset the variable to use mlflow.db here."
        ) from None
    print("\n".join([report.found, *map(str, report.files)]))


def _draw(options: argparse.Namespace) -> None:
    import torch

    from dvdp.evaluation.figures import grid, save_png
    from dvdp.models.export import load_model

    out = _picture(options.out)
    if options.count < 1:
        raise UserError(f"--count: found {options.count}, expected at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found no GPU that torch can use here, expected one; leave out --device.")
    model = load_model(options.weights, options.device)
    images = model.sample(
        options.count, seed=options.seed, steps=options.steps, solver=options.solver, label=options.label
    )
    print(save_png(grid(images), out))


if __name__ == "__main__":
    sys.exit(main())
