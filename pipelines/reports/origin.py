"""How the results of a report were made, and what leads back to them: "How this was made" and "Use it" of its page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dvdp.config import Params, Run
from dvdp.data.store import ImageStore
from dvdp.models.flops import training_images
from dvdp.training import ledger
from dvdp.training.memory import parameter_count
from pipelines.addresses import LOCAL_PAGE, mlflow_page, public
from pipelines.jobs.device import Machine, read_machine
from pipelines.jobs.job import Job
from pipelines.jobs.paths import DataPaths
from pipelines.provenance import DVC_HASH, GIT_COMMIT, provenance
from pipelines.reports.comparison import Result
from pipelines.reports.text_tables import si


@dataclass(frozen=True)
class Link:
    """A cell or a line of the page that may lead somewhere."""

    text: str
    address: str = ""
    """http or https; empty for plain text."""


@dataclass(frozen=True)
class Services:
    """Where MLflow and Prefect show what was made; what is empty is not known."""

    mlflow: str = ""
    """MLflow's address."""
    runs: Mapping[str, tuple[str, str]] | None = None
    """Ids of experiment and run in MLflow, by the name of the job."""
    prefect: str = ""
    """Prefect's API address."""
    flow_run: str = ""
    """Id of the flow run."""


def facts(results: Sequence[Result], services: Services) -> dict[str, Link]:
    """What all runs have in common, a line each: {what: it}."""
    job = results[0].job
    params, store = job.params, ImageStore(DataPaths.of(job.params).store)
    about = provenance(store=store.path)
    base = _base(job.run, params)
    commit = about.get(GIT_COMMIT, "")
    lines = {
        "data set": f"{store.metadata.name}: {store.metadata.count:,} images of {store.metadata.resolution} px",
        "data digest": store.metadata.digest,
        "DVC hash of the data": about.get(DVC_HASH, "not in dvc.lock"),
        "git commit": _code(commit) if commit else "not in a git repository",
        "network": _network(base),
        "optimiser": _optimiser(base),
        **_starts(results),
        "batch": f"{base.training.batch} images a step"
        + (f", in {base.training.accumulation} parts" if base.training.accumulation > 1 else ""),
        "precision": base.training.precision,
        "EMA": f"half-life of {base.training.ema_halflife_images:,} images",
        "schedule": f"{base.schedule.base}, T = {base.schedule.timesteps:,}, attenuation {base.schedule.attenuation}"
        f" to {base.schedule.floor:g}",
        "sampling": f"{base.sampling.count:,} images, {base.sampling.solver}, {base.sampling.steps} steps, EMA weights,"
        f" seed {base.sampling.seed}",
        "seeds": ", ".join(map(str, params.seeds)),
        **_overrides(params),
        "trained on": "; ".join(dict.fromkeys(_machine(read_machine(result.job)) for result in results)),
        "report written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return {**{name: Link(text) for name, text in lines.items()}, **_shown_by(services)}


def run_table(results: Sequence[Result], services: Services) -> tuple[list[str], list[list[str | Link]]]:
    """Headings and cells: of every run its hash, images, end, code, and its page in MLflow."""
    headings = ["run", "training hash", "images", "trained until", "code", "MLflow run"]
    return headings, [_run(result.job, services) for result in results]


def commands(best: Job, name: str, tracking: str = "") -> list[tuple[str, str]]:
    """What to type to use the best setting: {what it does: it}.

    Args:
        best: its first seed.
        name: of the registered model.
        tracking: address of MLflow, if it has one.
    """
    store = ImageStore(DataPaths.of(best.params).store)
    labels = store.metadata.labels if best.run.model.num_classes else ()
    labelled = bool(labels) and labels[0].isprintable()
    label, of_class = (f" --label {shlex.quote(labels[0])}", f" of class {labels[0]}") if labelled else ("", "")
    sampling = best.run.sampling
    request = {"count": 16, "format": "numbers", "solver": sampling.solver, "steps": sampling.steps}
    where = f'mlflow.set_tracking_uri("{public(tracking)}")\n' if tracking.startswith("http") else ""
    return [
        (
            f"A picture of 16 images{of_class} from {best.name}, in the project's folder:",
            f"dvdp draw {shlex.quote(str(best.weights))} --count 16{label} --out samples.png",
        ),
        (
            f"Images from the champion of {name}, which later runs may replace; each with its seed and index:",
            f"import mlflow, pandas\n\n{where}"
            f'model = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
            f"drawn = model.predict(pandas.DataFrame([{json.dumps(request)}]))",
        ),
        ("Go back to the champion before:", f"dvdp rollback {name}"),
    ]


def _base(run: Run, params: Params) -> Run:
    """With the sections that settings have in common."""
    sections = {name: getattr(params, name) for name in ("schedule", "model", "sampling")}
    training = type(run.training)(**{**vars(params.training), "precision": run.training.precision})
    return type(run)(**{**vars(run), **sections, "training": training})


def _starts(results: Sequence[Result]) -> dict[str, str]:
    """What settings started from, other than random weights."""
    found = {result.job.run.setting: result.job.run.start for result in results}
    return {
        f"start of {name}": f"weights of {start.setting}, SHA-256 {start.sha256[:12]}, which had seen {start.seen}"
        for name, start in found.items()
        if start
    }


def _network(run: Run) -> str:
    model = run.model
    parts = [
        f"UNet of Dhariwal & Nichol, {si(parameter_count(run))} parameters",
        f"{model.model_channels} channels x {_list(model.channel_mult)}",
        f"residual blocks a stage: {model.num_res_blocks}",
        f"attention at factors {_list(model.attention_factors)}" if model.attention_factors else "no further attention",
        *([f"dropout {model.dropout:g}"] if model.dropout else []),
        "one for all levels" if model.networks == "shared" else "one for each level",
        model.prediction_type,
        f"class-conditional with {model.num_classes} classes" if model.num_classes else "unconditional",
    ]
    return ", ".join(parts)


def _optimiser(run: Run) -> str:
    training = run.training
    names = {"adamw": "AdamW", "muon": "Muon for matrices, AdamW for the rest"}
    parts = [
        names[training.optimizer],
        f"learning rate {training.learning_rate:g}",
        f"warm-up over {training.warmup_images:,} images" if training.warmup_images else "no warm-up",
        f"linear to 0 over the last {100 * training.cooldown:.0f} %" if training.cooldown else "constant",
        f"weight decay {training.weight_decay:g}",
        f"gradients clipped at {training.clip_norm:g}",
    ]
    return ", ".join(parts)


def _overrides(params: Params) -> dict[str, str]:
    """What settings have of their own."""
    lines = {}
    for name, setting in params.settings.items():
        own = [f"{section}.{key} {value}" for section, keys in setting.overrides.items() for key, value in keys.items()]
        if own:
            lines[f"only {name}"] = ", ".join(own)
    return lines


def _machine(machine: Machine) -> str:
    if not machine.device:
        return "a device that was not recorded"
    what = "GPU" if machine.gpu else "core"
    return (
        f"{machine.device}, {machine.devices} {what}{'s' if machine.devices > 1 else ''} a run; dvdp {machine.dvdp},"
        f" torch {machine.torch}, Python {machine.python}"
    )


def _shown_by(services: Services) -> dict[str, Link]:
    experiment = next(iter((services.runs or {}).values()), ("", ""))[0]
    prefect = public(services.prefect).removesuffix("/").removesuffix("/api")
    flow_run = f"flow run {services.flow_run}" if services.flow_run else "no flow run"
    server = services.mlflow if services.mlflow.startswith("http") else ""
    return {
        "MLflow": Link(f"{public(server)}, experiment {experiment}", mlflow_page(server, experiment))
        if server and experiment
        else Link(f"make ui, then open {mlflow_page(LOCAL_PAGE, experiment)}"),
        "Prefect": Link(flow_run, f"{prefect}/runs/flow-run/{services.flow_run}")
        if prefect.startswith("http") and services.flow_run
        else Link(f"{flow_run}; make services, then open http://127.0.0.1:4200"),
    }


def _run(job: Job, services: Services) -> list[str | Link]:
    about = _json(job.folder / "run.json")
    entries = ledger.read(job.folder / "metrics.jsonl")
    experiment, run_id = (services.runs or {}).get(job.name, ("", ""))
    shown = services.mlflow.startswith("http") and run_id
    address = mlflow_page(services.mlflow, experiment, run_id) if shown else ""
    return [
        job.name,
        job.training_hash,
        f"{training_images(job.run):,}",
        f"{datetime.fromtimestamp(entries[-1].time, UTC):%Y-%m-%d %H:%M} UTC" if entries else "-",
        _code(about.get(GIT_COMMIT, ""), 12) or "-",
        Link(run_id[:8] or "-", address),
    ]


def _code(commit: str, digits: int = 40) -> str:
    return commit[:digits] + (", with uncommitted changes" if commit.endswith("-dirty") else "")


def _list(numbers: Sequence[int]) -> str:
    return f"({', '.join(map(str, numbers))})"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
