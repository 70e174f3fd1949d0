"""What MLflow's pages say of a run, and of a version of a model: its card."""

from __future__ import annotations

import json
from urllib.parse import quote

from mlflow.entities.model_registry import ModelVersion

from dvdp.data.store import ImageStore
from dvdp.evaluation.copies import copies_sentence
from dvdp.evaluation.likelihood import METRIC
from dvdp.evaluation.records import ScoreRecord
from dvdp.models.flops import relative_flops, training_images
from dvdp.text import markdown, utf8
from pipelines.addresses import mlflow_page
from pipelines.jobs.device import read_machine
from pipelines.jobs.job import Job
from pipelines.jobs.paths import DataPaths
from pipelines.provenance import DVC_HASH, GIT_COMMIT
from pipelines.tracking.runs import DATASET_DIGEST, TRAINING_HASH, TrackedRun, cut

#: Tags of a run: what it was trained on, and with.
DEVICE, VERSIONS = "dvdp.device", "dvdp.versions"
#: What is known of the licences of data sets, by ``dataset.source``.
_LICENCES = {
    "digits": "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)",
    "cifar10": "its authors state none",
    "celeba": "non-commercial research only, as its authors say",
    "ffhq": "CC BY-NC-SA 4.0 for the collection, and that of each photograph",
    "imagenet64": "non-commercial research only, as ImageNet says",
}
_NOT_FID = "Not FID: a Fréchet distance in the features of a small network, of use within this data set alone."
#: What databases of MLflow take as the description of a version.
_MOST = 5000


def machine_tags(job: Job) -> dict[str, str]:
    """What a run was trained on, as far as it was written down."""
    machine = read_machine(job)
    if not machine.device:
        return {}
    what, count = "GPU" if machine.gpu else "core", machine.devices
    versions = f"dvdp {machine.dvdp}, torch {machine.torch}, python {machine.python}"
    return {DEVICE: f"{machine.device}, {count} {what}{'' if count == 1 else 's'}", VERSIONS: versions}


def run_description(job: Job, record: ScoreRecord | None = None) -> str:
    """Of a trained setting, in Markdown."""
    lines = [
        f"{_what(job)}, on {markdown(job.params.dataset.name)} at {job.params.dataset.resolution} px.",
        f"Steps count training images, {training_images(job.run):,} in all; an image of it takes"
        f" {relative_flops(job.run):.2f} times DDPM's FLOPs.",
    ]
    if job.run.start:
        lines.append(_start(job))
    if record is not None:
        lines.append(f"Score: {_score(record)}.")
    lines.append(
        "Artifacts: `pictures` of samples and of the process, `score.json`, `params.json`, `log.txt`, and the model."
    )
    return utf8("\n\n".join(lines))


def model_card(job: Job, record: ScoreRecord, run: TrackedRun, version: ModelVersion, picture: str) -> str:
    """Of a version: what it is, how good, what to mind, how to use it, where it comes from; Markdown.

    Args:
        run: that the version was made by.
        picture: of samples, an artifact of the run.
    """
    data, sampling, tags = ImageStore(DataPaths.of(job.params).store).metadata, job.run.sampling, version.tags
    about = run.client.get_run(run.run_id).data.tags
    request: dict[str, int | str] = {"count": 4, "seed": 0, "format": "numbers"}
    if job.run.model.num_classes and data.labels:
        request["label"] = data.labels[0]
    cells = {
        f"{record.headline} ↓": record.estimate.text,
        **{
            name: record.estimate_of(found).text
            for name in ("precision", "recall")
            if (found := next((key for key in record.metrics if key.startswith(name)), None))
        },
        **({"bits / dim ↓": record.estimate_of(METRIC).text} if METRIC in record.metrics else {}),
        "samples": f"{record.samples:,}",
        "solver": f"{sampling.solver}, {sampling.steps} steps",
        "training images": f"{training_images(job.run):,}",
        "FLOPs of DDPM": f"{relative_flops(job.run):.2f}",
    }
    page = mlflow_page("", run.experiment_id, run.run_id)
    kept = {
        "git commit": about.get(GIT_COMMIT),
        "training hash": tags.get(TRAINING_HASH),
        "DVC hash of the data": about.get(DVC_HASH),
        "trained on": about.get(DEVICE),
        "versions": about.get(VERSIONS),
    }
    minds = [
        *([] if record.headline == "fid" else [_NOT_FID]),
        *([_start(job)] if job.run.start else []),
        "The interval is 95 % over draws of the samples; another training seed may differ by more.",
        copies_sentence(record),
        *record.warnings,
    ]
    source = job.params.dataset.source
    lines = [
        f"{_what(job)}.",
        "",
        f"| {' | '.join(map(markdown, cells))} |",
        f"|{' --- |' * len(cells)}",
        f"| {' | '.join(map(markdown, cells.values()))} |",
        "",
        f"![samples](get-artifact?path={quote(picture)}&run_uuid={run.run_id})",
        "",
        "**Use**",
        "```python",
        "import mlflow, pandas",
        f'model = mlflow.pyfunc.load_model("models:/{version.name}/{version.version}")',
        "# a row for each image: image, uint8 (H, W, 3), with the seed and index that draw it again",
        f"drawn = model.predict(pandas.DataFrame([{json.dumps(request)}]))",
        "```",
        "**Mind**",
        *(f"- {markdown(each)}" for each in minds),
        "",
        "**Data**",
        f"- {markdown(data.name)}: {data.count:,} images of {data.resolution} px, digest"
        f" {markdown(tags.get(DATASET_DIGEST, '')[:16])}",
        f"- licence: {_LICENCES.get(source, 'not known here; it is that of your images')}",
        "",
        "**Origin**",
        f"- [run]({page}), with curves, params, score record and log",
        *(f"- {name}: {markdown(value)}" for name, value in kept.items() if value),
    ]
    return cut(utf8("\n".join(lines)), _MOST)


def _start(job: Job) -> str:
    start = job.run.start
    if start is None:
        return ""
    name = f"{start.setting} (training hash {start.training})" if start.training else start.setting
    return f"Training started from weights of {name} that had seen {start.seen}; these are in no other number here."


def _what(job: Job) -> str:
    run = job.run
    points = ", ".join(map(str, run.turning_points))
    kind = {"ddpm": "DDPM", "dvdp": "DVDP", "subspace": "Subspace diffusion"}[run.process]
    classes = f"class-conditional ({run.model.num_classes} classes)" if run.model.num_classes else "unconditional"
    return f"{kind}{f' with turning points {{{points}}}' if points else ''}, {classes}, seed {run.seed}"


def _score(record: ScoreRecord) -> str:
    sampling = record.sampling
    return (
        f"{markdown(record.headline)} {record.estimate.text} (lower is better) from {record.samples:,} samples,"
        f" {sampling.get('solver')}, {sampling.get('steps')} steps"
    )
