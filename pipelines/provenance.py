"""Where a run comes from: the git commit, DVC's hash of the data, and whether the data are what dvc.lock names.

And where it goes to when DVC runs an experiment in a copy of the project.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from dvdp.errors import UserError
from dvdp.yaml_files import read_yaml

#: Tags that lead back to where a run, or a version of a model, comes from.
GIT_COMMIT = "dvdp.git_commit"
DVC_HASH = "dvdp.dvc_hash"
#: Tag with the name of an experiment of DVC, for `dvc exp show` and `dvc exp apply`.
DVC_EXPERIMENT = "dvdp.dvc_experiment"

#: What DVC itself writes, or removes while a stage runs, among the files of git. A changed one is no changed code.
_WRITTEN_BY_DVC = ("dvc.lock", "data", "reports")


def provenance(project: Path | str = ".", store: Path | None = None) -> dict[str, str]:
    """Tags of the code and data that a run is made with, as far as there are any: git commit and DVC's hash.

    The commit ends in ``-dirty`` if code or params differ from it.

    Args:
        store: the prepared data set; ``dvc.lock`` names its hash.
    """
    tags = {DVC_EXPERIMENT: os.environ["DVC_EXP_NAME"]} if "DVC_EXP_NAME" in os.environ else {}
    lock = Path(project) / "dvc.lock"
    if store is not None and lock.is_file():
        stages = (read_yaml(lock) or {}).get("stages", {})
        for out in (out for stage in stages.values() for out in stage.get("outs", [])):
            if Path(out["path"]) == store and "md5" in out:
                tags[DVC_HASH] = out["md5"]
    commit = _git(project, "rev-parse", "HEAD")
    if commit:
        others = [f":(exclude){path}" for path in _WRITTEN_BY_DVC]
        dirty = _git(project, "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
        tags[GIT_COMMIT] = commit + ("-dirty" if dirty else "")
        # The one that MLflow's page shows.
        tags["mlflow.source.git.commit"] = commit
    return tags


def keep_in_project(*paths: Path | str) -> None:
    """Make paths those of the project where DVC runs an experiment in a copy that it deletes (``--temp``, ``--queue``).

    Args:
        paths: relative ones, of folders, or of files with a suffix; each becomes a symbolic link in the copy.
    """
    project = Path(os.environ.get("DVC_ROOT", ".")).resolve()
    if not Path.cwd().is_relative_to(project / ".dvc" / "tmp" / "exps"):
        return
    for path in map(Path, paths):
        if not (path.is_absolute() or path.exists() or path.is_symlink()):
            kept = project / path
            (kept.parent if path.suffix else kept).mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(kept)


def _git(project: Path | str, *arguments: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        command = ["git", "-C", str(project), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def check_data_is_locked(store: Path, project: Path = Path()) -> None:
    """Raise UserError unless the prepared data set is the one that ``dvc.lock`` names."""
    if not (project / "dvc.lock").is_file():
        raise UserError(
            "dvc.lock: found no such file, expected the data set that a `dvc repro` has prepared; run that, or name the"
            " folder of the report with --reports."
        )
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        stages = [
            stage
            for stage in repo.stage.collect("prepare")
            if any(Path(o.fs_path) == store.resolve() for o in stage.outs)
        ]
        outs = [out for stage in stages for out in stage.outs if Path(out.fs_path) == store.resolve()]
        if not outs or any(out.changed() for out in outs):
            raise UserError(
                f"dataset: found '{store}' other than dvc.lock names it, expected it unchanged;"
                " run `dvc checkout prepare`, or `dvc repro` to accept new data."
            )
