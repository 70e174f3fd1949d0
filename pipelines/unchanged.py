"""Scheduled runs read the data that ``dvc.lock`` names, and say so when it is not there."""

from __future__ import annotations

from pathlib import Path

from dvdp.errors import UserError


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
