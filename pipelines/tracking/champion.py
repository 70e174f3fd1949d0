"""Which version of a registered model is champion: what a person says, and else the scores.

Three aliases say how things stand. ``champion`` is the version to use, ``previous`` the one that ``dvdp rollback``
goes back to, and ``candidate`` the best version that passed the gate but was not promoted. Two tags of the registered
model remember: ``dvdp.champions`` lists the champions so far, oldest first, and ``dvdp.champion_set_by`` says whether a
person or its score made the last of them champion. Where the alias points elsewhere than that list ends, a person has
moved it in MLflow's page. What a person has set stays until a person releases it. A tag of a version,
``dvdp.rejected``, keeps it from ever being promoted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dvdp.errors import UserError
from dvdp.evaluation.intervals import CONFIDENCE, better, difference
from dvdp.evaluation.records import ScoreRecord, score_differences
from dvdp.files import locked
from pipelines.tracking.connection import lock_of
from pipelines.tracking.gate import flaw_of
from pipelines.tracking.registry import ready_versions, score_of

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"
#: Tags of the registered model.
CHAMPIONS, SET_BY = "dvdp.champions", "dvdp.champion_set_by"
#: Tag of a version: why it must not be promoted.
REJECTED = "dvdp.rejected"
_PERSON, _SCORE = "a person", "its score"
#: Former champions that are remembered.
_MOST = 100

#: Why a version is not fit to be used, or the empty string.
Check = Callable[[MlflowClient, ModelVersion, ScoreRecord], str]


@dataclass(frozen=True)
class Promotion:
    """What became of the alias ``champion``."""

    champion: int | None
    """The version that has it now."""
    moved: bool
    text: str
    """A few sentences for people."""


@dataclass(frozen=True)
class _Standing:
    champion: int | None
    pinned: bool
    """Whether a person made it champion."""
    past: tuple[int, ...] = ()
    """Former champions, oldest first."""
    candidate: int | None = None


@dataclass(frozen=True)
class _State:
    """A registered model as MLflow has it."""

    aliases: Mapping[str, int]
    tags: Mapping[str, str]
    versions: Mapping[int, ModelVersion] = field(repr=False)
    """Those that are whole."""

    @property
    def rejected(self) -> set[int]:
        return {number for number, version in self.versions.items() if REJECTED in version.tags}

    @property
    def standing(self) -> _Standing:
        """With what people have done in MLflow's page."""
        known = _numbers(self.tags.get(CHAMPIONS, ""))
        holder, previous = self.aliases.get(CHAMPION), self.aliases.get(PREVIOUS)
        moved = holder is not None and holder != (known[-1] if known else None)
        past = known if moved or holder is None else known[:-1]
        if previous is not None and previous != (known[-2] if len(known) > 1 else None):
            past = [*past, previous]
        pinned = holder is not None and (moved or self.tags.get(SET_BY) == _PERSON)
        return self.allowed(_Standing(holder, pinned, tuple(past), self.aliases.get(CANDIDATE)))

    def allowed(self, standing: _Standing) -> _Standing:
        """The standing without versions that are gone or rejected, but for the champion."""
        line: list[int] = []
        for number in (*standing.past, *([] if standing.champion is None else [standing.champion])):
            there = number == standing.champion or (number in self.versions and number not in self.rejected)
            if there and line[-1:] != [number]:
                line.append(number)
        past = line if standing.champion is None else line[:-1]
        fit = standing.candidate in self.versions and standing.candidate not in {*self.rejected, standing.champion}
        return replace(standing, past=tuple(past[-_MOST:]), candidate=standing.candidate if fit else None)


def promote_best(client: MlflowClient, name: str, max_score: float | None = None, check: Check = flaw_of) -> Promotion:
    """Give the alias ``champion`` to the version with the best (lowest) score, unless a person has set it.

    It moves only between versions whose score records agree in what matters: with a champion, only to versions that
    compare with it; without one, to the best of those that compare with the newest scored version. What is promoted
    passes a gate: it is better than the champion by more than the uncertainty of both scores, its score is at most
    ``max_score``, and ``check`` finds no flaw. The best that passes but is not promoted becomes ``candidate``.

    Args:
        max_score: of a champion; None for any.
        check: what else a version must do; asked of as few versions as it takes.

    Raises:
        UserError: there is no such model, or no version of it has a score.
    """
    checked: dict[int, str] = {}
    while True:
        with locked(lock_of(client.tracking_uri)):
            state = _read(client, name)
            records = {n: record for n, v in state.versions.items() if (record := score_of(v)) is not None}
            chosen = _choose(name, state, records, max_score, checked)
            if not isinstance(chosen, int):
                after, text = chosen
                return _settle(client, name, state, after, text)
        # Without the lock, as it takes a while.
        checked[chosen] = check(client, state.versions[chosen], records[chosen])


def pin(client: MlflowClient, name: str, number: int) -> Promotion:
    """Make a version champion, as a person wants it, until :func:`release`.

    Raises:
        UserError: there is no such model or version, or it was rejected.
    """
    with locked(lock_of(client.tracking_uri)):
        state = _read(client, name)
        version = _version(state, name, number)
        if number in state.rejected:
            raise UserError(
                f"VERSION: found {number}, which was rejected ('{version.tags[REJECTED]}'), expected another; delete"
                f" the tag {REJECTED} of the version in MLflow if it should be used after all."
            )
        before = state.standing
        past = (*before.past, *([before.champion] if before.champion else []))
        was = f" Before, it was version {before.champion}." if before.champion not in (None, number) else ""
        text = f"Version {number} of {name} is champion until `dvdp promote {name} --auto` releases it.{was}"
        return _settle(client, name, state, replace(before, champion=number, pinned=True, past=past), text)


def release(client: MlflowClient, name: str) -> None:
    """Let the scores choose the champion again.

    Raises:
        UserError: there is no such model.
    """
    with locked(lock_of(client.tracking_uri)):
        state = _read(client, name)
        _settle(client, name, state, replace(state.standing, pinned=False), "")


def rollback(client: MlflowClient, name: str) -> Promotion:
    """Make the version with the alias ``previous`` champion again, until :func:`release`; it undoes a promotion.

    Raises:
        UserError: there is no such model, or no version to go back to.
    """
    with locked(lock_of(client.tracking_uri)):
        state = _read(client, name)
        before = state.standing
        if not before.past:
            raise UserError(
                f"MODEL: found no former champion of '{name}' to go back to, expected one; choose a version with"
                f" `dvdp promote {name} VERSION`."
            )
        *past, number = before.past
        text = (
            f"Version {number} of {name} is champion again, in place of version {before.champion}, until"
            f" `dvdp promote {name} --auto` releases it."
        )
        return _settle(client, name, state, replace(before, champion=number, pinned=True, past=tuple(past)), text)


def reject(client: MlflowClient, name: str, number: int, reason: str) -> Promotion:
    """Let a version never be promoted again; if it is champion, the one before it is champion again.

    Raises:
        UserError: there is no such model or version.
    """
    with locked(lock_of(client.tracking_uri)):
        before = _read(client, name)
        _version(before, name, number)
        client.set_model_version_tag(name, str(number), REJECTED, reason)
        state = replace(before, versions={int(v.version): v for v in ready_versions(client, name)})
        standing = before.standing
        text = f"Version {number} of {name} is rejected and never promoted again."
        if standing.champion == number:
            past = [n for n in standing.past if n not in state.rejected]
            standing = replace(standing, champion=past[-1] if past else None, pinned=False, past=tuple(past[:-1]))
            text += f" Version {past[-1]} is champion again." if past else " There is no champion now."
        return _settle(client, name, state, standing, text)


def _choose(
    name: str,
    state: _State,
    records: Mapping[int, ScoreRecord],
    max_score: float | None,
    checked: Mapping[int, str],
) -> tuple[_Standing, str] | int:
    """The new standing and what to say of it, or the version that must be checked before."""
    before = state.standing
    if not records and before.champion is None:
        raise UserError(f"champion: found no scored version of '{name}', expected at least one; evaluate and register.")
    # A rejected version is champion only as long as a person says so.
    holder = before.champion if before.pinned or before.champion not in state.rejected else None
    own = None if holder is None else records.get(holder)
    scored = {number: record for number, record in records.items() if number not in state.rejected}
    rivals, notes = _rivals(scored, holder, own, max_score)
    for number in rivals:
        if number not in checked:
            return number
        if not checked[number]:
            break
        notes.append(f"Version {number} cannot be champion: {checked[number]}.")
    best = next((number for number in rivals if not checked[number]), None)
    unsure = best is not None and own is not None and not _surely_lower(scored[best], own)
    if best is not None and not before.pinned and not unsure and (own is not None or holder is None):
        past = (*before.past, *([] if before.champion is None else [before.champion]))
        was = f", version {holder} had {own.estimate.text}" if own is not None else ""
        first = f"Version {best} of {name} is now champion ({_shown(scored[best])}{was})."
        return replace(before, champion=best, past=past, candidate=None), " ".join([first, *notes])
    if holder is None:
        first = f"There is no champion of {name}."
    else:
        first = f"Version {holder} of {name} stays champion"
        first += ": it has no score to compare others with" if own is None else f" ({_shown(own)})"
        first += f", as a person set it; `dvdp promote {name} --auto` releases it." if before.pinned else "."
    if best is not None:
        notes.insert(0, f"Version {best} is the candidate ({_shown(scored[best])}).")
    if best is not None and own is not None and unsure:
        low, high = difference(scored[best].estimate, own.estimate)
        notes.insert(1, f"That is no significant difference: {low:z.2f} to {high:z.2f} at {100 * CONFIDENCE:.0f} %.")
    return replace(before, champion=holder, candidate=best), " ".join([first, *notes])


def _rivals(
    scored: Mapping[int, ScoreRecord], holder: int | None, own: ScoreRecord | None, max_score: float | None
) -> tuple[list[int], list[str]]:
    """The versions whose scores are lower than the champion's, best first, and why others are none of them."""
    if not scored:
        return [], []
    notes = []
    newest = max(scored)
    measure = own or scored[newest]
    different = {number: score_differences(measure, record) for number, record in scored.items()}
    if different[newest]:
        notes.append(f"Version {newest} does not compare with it, as they differ in {', '.join(different[newest])}.")
    least = math.inf if own is None else _score(own)
    lower = [n for n, record in scored.items() if not different[n] and n != holder and _score(record) < least]
    # The newest of equals first.
    lower.sort(key=lambda n: (_score(scored[n]), -n))
    if lower and max_score is not None and _score(scored[lower[0]]) > max_score:
        notes.append(
            f"Version {lower[0]} cannot be champion: its {_shown(scored[lower[0]])} is above tracking.max_score,"
            f" {max_score:.4g}."
        )
    return [n for n in lower if max_score is None or _score(scored[n]) <= max_score], notes


def _surely_lower(a: ScoreRecord, b: ScoreRecord) -> bool:
    """Whether a score is lower than another by more than chance explains; plainly, where an error is not known."""
    if math.isinf(a.estimate.error + b.estimate.error):
        return _score(a) < _score(b)
    return better(a.estimate, b.estimate)


def _score(record: ScoreRecord) -> float:
    return record.metrics[record.headline]


def _shown(record: ScoreRecord) -> str:
    return f"{record.headline} {record.estimate.text}"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split() if part.isdigit()]


def _read(client: MlflowClient, name: str) -> _State:
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        there = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        raise UserError(f"MODEL: found no registered model '{name}', expected one of {there}.") from None
    versions = {int(version.version): version for version in ready_versions(client, name)}
    return _State({alias: int(number) for alias, number in model.aliases.items()}, model.tags, versions)


def _version(state: _State, name: str, number: int) -> ModelVersion:
    if number not in state.versions:
        raise UserError(
            f"VERSION: found {number}, which is no version of '{name}', expected one of {_ranges(state.versions)}."
        )
    return state.versions[number]


def _ranges(numbers: Iterable[int]) -> str:
    """E.g. ``1-3, 5``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, part)) for part in ranges) or "none"


def _settle(client: MlflowClient, name: str, state: _State, standing: _Standing, text: str) -> Promotion:
    """Let MLflow have a standing; writes only what differs."""
    after = state.allowed(standing)
    holder = after.champion
    _set_alias(client, name, state, CHAMPION, holder)
    champions: Sequence[int] = (*after.past, *([] if holder is None else [holder]))
    said = {CHAMPIONS: " ".join(map(str, champions)), SET_BY: _PERSON if after.pinned else _SCORE}
    for key, value in said.items():
        if state.tags.get(key) != value:
            client.set_registered_model_tag(name, key, value)
    _set_alias(client, name, state, PREVIOUS, after.past[-1] if after.past else None)
    _set_alias(client, name, state, CANDIDATE, after.candidate)
    return Promotion(holder, holder != state.aliases.get(CHAMPION), text)


def _set_alias(client: MlflowClient, name: str, state: _State, alias: str, number: int | None) -> None:
    if number is None and alias in state.aliases:
        client.delete_registered_model_alias(name, alias)
    elif number is not None and state.aliases.get(alias) != number:
        client.set_registered_model_alias(name, alias, str(number))
