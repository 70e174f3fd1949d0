"""``dvdp clean``: what runs leave that nobody needs any more, shown first and removed where that is said.

Weights, ledgers and scores in the folders of runs always stay, and so does all that a run in progress holds. DVC's
cache is DVC's own: ``dvc gc``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import httpx
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from dvdp.config import Params
from dvdp.errors import UserError, did_you_mean
from dvdp.files import locked
from dvdp.training.loop import is_finished
from pipelines.artifacts import KINDS as ARTIFACTS
from pipelines.artifacts import artifact_key
from pipelines.left_behind import RUNNING
from pipelines.tracking.champion import CHAMPIONS, REJECTED
from pipelines.tracking.connection import NoAnswer, reading, there_is_a_store
from pipelines.tracking.job_runs import model_name
from pipelines.tracking.registry import ready_versions
from pipelines.tracking.runs import SETTING

#: Tags of versions that stay: those that a person wants to keep, and those that must not come back unmarked.
KEPT_TAGS = ("dvdp.keep", REJECTED)
#: Artifacts that Prefect is asked for at a time, with their data.
PAGE = 50


@dataclass(frozen=True)
class Removal:
    """Something that may go."""

    kind: str
    """One of :data:`KINDS`."""
    name: str
    """For people."""
    size: int
    """In bytes."""
    remove: Callable[[], object]


def clean(params: Params, keep: Collection[str] = (), days: int = 30, yes: bool = False) -> str:
    """Remove what the params' runs left, or say what would be removed; the text for people.

    Args:
        keep: of :data:`KINDS`, what stays whatever its age.
        days: age at which an artifact in Prefect goes.
        yes: remove it.

    Raises:
        UserError: there is no such kind.
    """
    for kind in keep:
        if kind not in KINDS:
            raise UserError(f"--keep: found '{kind}'{did_you_mean(kind, KINDS)}, expected one of {', '.join(KINDS)}.")
    lines, total, count = [], 0, 0
    for kind, find in KINDS.items():
        if kind in keep:
            lines.append(f"{kind:<12} all kept")
            continue
        try:
            for removal in find(params, days):
                if yes:
                    removal.remove()
                lines.append(f"{kind:<12} {removal.size / 2**30:9.4f} GiB  {removal.name}")
                total, count = total + removal.size, count + 1
        except _Left as left:
            lines.append(f"{kind:<12} all kept: {left}")
    done = "removed" if yes else "nothing was removed yet, the same command with --yes does it"
    return "\n".join([*lines, f"{count} in all, {total / 2**30:.4f} GiB: {done}."])


class _Left(Exception):  # noqa: N818 - a state of affairs
    """Why things of a kind stay this time."""


def _checkpoints(params: Params, days: int) -> Iterator[Removal]:
    for folder in _finished(params):
        yield from _below(folder, "checkpoints", [folder / "checkpoints"])


def _samples(params: Params, days: int) -> Iterator[Removal]:
    for file in RUNNING.glob("*.lock"):
        with locked(file, patience=0) as free:
            if not free:  # Its report shows samples of runs that are finished.
                raise _Left("an experiment runs here")
    for folder in _finished(params):
        # Without a score they are still to be scored.
        if any(folder.glob("scores/*.json")):
            yield from _below(folder, "samples", sorted(folder.glob("samples/*")))


def _finished(params: Params) -> list[Path]:
    """Folders of runs, and of registered models that were scored, that have their weights."""
    storage = params.cluster.storage
    return [folder for folder in sorted([*storage.glob("*"), *storage.glob("models/*")]) if is_finished(folder)]


def _below(folder: Path, kind: str, places: list[Path]) -> Iterator[Removal]:
    """What lies in places of a run's folder, unless a process holds it."""
    with _nobody_in(folder) as free:
        size = sum(_bytes(place) for place in places)
        if not (free and size):
            return

        def remove() -> None:
            for place in places:
                shutil.rmtree(place)

        # Whoever takes it removes it before asking for the next: the locks are held until then.
        yield Removal(kind, f"{folder} ({_setting(folder)})", size, remove)


@contextlib.contextmanager
def _nobody_in(folder: Path) -> Iterator[bool]:
    """Hold the locks of a run's folder; whether all were free."""
    with contextlib.ExitStack() as stack:
        files = [*folder.glob("lock"), *folder.glob("*.lock")]
        yield all(stack.enter_context(locked(file, patience=0)) for file in files)


def _setting(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        run = json.loads((folder / "run.json").read_text())["run"]
        return f"{run['setting']}, seed {run['seed']}"
    return "a registered model" if folder.parent.name == "models" else "a run"


def _bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _model_versions(params: Params, days: int) -> Iterator[Removal]:
    if not there_is_a_store():
        return
    name = model_name(params)
    try:
        with reading("holds the registered models") as client:
            for version in _unneeded(client, name):
                files = get_artifact_repository(str(version.source), tracking_uri=client.tracking_uri)
                about = f"version {version.version} of {name} ({version.tags.get(SETTING, 'unknown setting')})"
                yield Removal("versions", about, _stored(files), partial(_delete, client, version, files))
    except NoAnswer:
        raise _Left("MLflow does not answer") from None


def _unneeded(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Versions that never had an alias, are not of the newest comparison, and that nobody wants to keep."""
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    aliased = {*map(str, model.aliases.values()), *model.tags.get(CHAMPIONS, "").split()}
    versions = ready_versions(client, name)
    runs = [client.get_run(str(version.run_id)) for version in versions]
    parents = [run.data.tags.get(MLFLOW_PARENT_RUN_ID, "") for run in runs]
    began = {parent: client.get_run(parent).info.start_time for parent in {*parents} - {""}}
    newest = max(began, key=lambda parent: began[parent], default=None)
    return [
        version
        for version, run, parent in zip(versions, runs, parents, strict=True)
        if str(version.version) not in aliased
        and not any(tag in version.tags for tag in KEPT_TAGS)
        and run.info.status not in ("RUNNING", "SCHEDULED")
        and parent != newest
        and not _copied(client, version)
    ]


def _copied(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether another registered model has the same files."""
    addresses = (version.source, f"models:/{version.name}/{version.version}")
    found = [other for path in addresses for other in client.search_model_versions(f"source_path = '{path}'")]
    return any(other.name != version.name for other in found)


def _stored(files: ArtifactRepository, path: str | None = None) -> int:
    """Bytes of all files below a path."""
    return sum(_stored(files, file.path) if file.is_dir else file.file_size or 0 for file in files.list_artifacts(path))


def _delete(client: MlflowClient, version: ModelVersion, files: ArtifactRepository) -> None:
    experiment = client.get_run(str(version.run_id)).info.experiment_id
    for model in client.search_logged_models([experiment], f"source_run_id = '{version.run_id}'"):
        if model.artifact_location == version.source:
            client.delete_logged_model(model.model_id)
    client.delete_model_version(version.name, str(version.version))
    files.delete_artifacts()  # Last: should this be cut short, `mlflow gc` removes what a deleted model has left.


def _prefect_artifacts(params: Params, days: int) -> Iterator[Removal]:
    """Those of the data set that are older, but for the newest of each key."""
    if not (os.environ.get("PREFECT_API_URL") or (Path(os.environ.get("PREFECT_HOME", "")) / "prefect.db").is_file()):
        return
    from pipelines.prefect_server import guard_temporary_server

    guard_temporary_server()
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    oldest, name = datetime.now(UTC) - timedelta(days=days), params.dataset.name
    ours = re.compile(f"({'|'.join(artifact_key(kind, name) for kind in ARTIFACTS)})(-|$)")
    wanted = ArtifactFilter(key=ArtifactFilterKey(like_=f"{artifact_key('%', name)}%"))
    try:
        with get_client(sync_client=True) as client:
            seen, keys = 0, set()
            found = []
            while page := client.read_artifacts(
                artifact_filter=wanted, limit=PAGE, offset=seen, sort=ArtifactSort.CREATED_DESC
            ):
                for artifact in page:
                    key = artifact.key or ""
                    if key in keys and ours.match(key) and artifact.created and artifact.created < oldest:
                        about = f"{key} of {artifact.created:%Y-%m-%d}"
                        remove = partial(client.delete_artifact, artifact.id)
                        found.append(Removal("artifacts", about, len(json.dumps(artifact.data)), remove))
                    keys.add(key)
                seen += len(page)
            yield from found
    except httpx.HTTPError:
        raise _Left("Prefect does not answer") from None


#: What may be cleaned, with what finds it.
KINDS: dict[str, Callable[[Params, int], Iterator[Removal]]] = {
    "checkpoints": _checkpoints,
    "samples": _samples,
    "versions": _model_versions,
    "artifacts": _prefect_artifacts,
}
