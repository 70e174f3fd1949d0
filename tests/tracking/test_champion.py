"""A champion moves for a reason, and never against what a person has said."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlflow import MlflowClient

from dvdp import tensors
from dvdp.errors import UserError
from dvdp.evaluation.records import ScoreRecord
from dvdp.models.export import KIND, save_model
from pipelines.cli import main
from pipelines.tracking.champion import (
    CANDIDATE,
    CHAMPION,
    PREVIOUS,
    REJECTED,
    Promotion,
    pin,
    promote_best,
    reject,
    release,
    rollback,
)
from pipelines.tracking.gate import DRAWS, draws_images
from pipelines.tracking.registry import SCORE_RECORD, register
from pipelines.tracking.runs import TRAINING_HASH, TURNING_POINTS, open_run
from tests.tracking.support import (
    empty_store,
    free_port,
    mlflow_server,
    no_check,
    record,
    small_model,
)

NAME = "dvdp-digits"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    client = empty_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    client.create_registered_model(NAME)
    return client


def add(client: MlflowClient, score: ScoreRecord | float | None = None, name: str = NAME) -> int:
    """A version with this score, and without weights."""
    scores = record(score) if isinstance(score, float) else score
    tags = {} if scores is None else {SCORE_RECORD: json.dumps(dataclasses.asdict(scores))}
    return int(client.create_model_version(name, "file:///nowhere", tags=tags).version)


def rescore(client: MlflowClient, number: int, score: ScoreRecord) -> None:
    client.set_model_version_tag(NAME, str(number), SCORE_RECORD, json.dumps(dataclasses.asdict(score)))


def aliases(client: MlflowClient, name: str = NAME) -> dict[str, int]:
    return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}


def best(client: MlflowClient, **options: Any) -> Promotion:
    return promote_best(client, NAME, **{"check": no_check, **options})


# --- by score


def test_the_champion_is_the_best_and_moves_only_to_a_better_one(client: MlflowClient) -> None:
    for score in (3.0, 2.0, 2.5):
        add(client, score)
    assert best(client) == Promotion(2, True, f"Version 2 of {NAME} is now champion (fd_labels 2.00).")
    add(client, 2.0)
    assert best(client) == Promotion(2, False, f"Version 2 of {NAME} stays champion (fd_labels 2.00).")
    rescore(client, 3, record(1.5))
    assert best(client).text == f"Version 3 of {NAME} is now champion (fd_labels 1.50, version 2 had 2.00)."
    assert aliases(client) == {CHAMPION: 3, PREVIOUS: 2}


def test_a_better_number_that_does_not_compare_moves_nothing(client: MlflowClient) -> None:
    add(client, 3.0)
    best(client)
    other = record(1.0, samples=64, sampling={"solver": "ddim", "steps": 250, "seed": 0})
    add(client, other)
    assert best(client) == Promotion(
        1,
        False,
        f"Version 1 of {NAME} stays champion (fd_labels 3.00). Version 2 does not compare with it, as they differ in"
        " samples, sampling.solver.",
    )
    # Scored alike, it compares.
    rescore(client, 1, dataclasses.replace(other, metrics={"fd_labels": 2.0, "kd_labels": 0.1}))
    assert best(client).champion == 2


def test_the_first_champion_is_the_best_of_those_like_the_newest(client: MlflowClient) -> None:
    for score in (record(0.5, samples=64), record(2.0), record(3.0)):
        add(client, score)
    assert best(client).champion == 2


def test_versions_without_a_usable_score_never_win(client: MlflowClient) -> None:
    add(client)
    with pytest.raises(UserError, match=f"champion: found no scored version of '{NAME}'"):
        best(client)
    for score in (float("nan"), 2.0, 1.0):
        add(client, score)
    client.set_model_version_tag(NAME, "4", SCORE_RECORD, '{"of": "another release"}')
    assert best(client).champion == 3


def test_a_champion_without_a_score_stays(client: MlflowClient) -> None:
    add(client, 3.0)
    best(client)
    client.set_model_version_tag(NAME, "1", SCORE_RECORD, '{"of": "another release"}')
    add(client, 1.0)
    said = best(client)
    assert not said.moved
    assert said.text == (
        f"Version 1 of {NAME} stays champion: it has no score to compare others with. Version 2 is the candidate"
        " (fd_labels 1.00)."
    )
    assert aliases(client) == {CHAMPION: 1, CANDIDATE: 2}


# --- the gate


def test_no_version_above_the_highest_score_becomes_champion(client: MlflowClient) -> None:
    add(client, 30.0)
    assert best(client, max_score=20.0) == Promotion(
        None,
        False,
        f"There is no champion of {NAME}. Version 1 cannot be champion: its fd_labels 30.00 is above"
        " tracking.max_score, 20.",
    )
    assert aliases(client) == {}
    add(client, 19.0)
    assert best(client, max_score=20.0).champion == 2


def test_a_lead_that_chance_explains_makes_a_candidate(client: MlflowClient) -> None:
    def uncertain(fd: float, error: float) -> ScoreRecord:
        return record(fd, metrics={"fd_labels": fd, "fd_labels_error": error})

    add(client, uncertain(2.0, 0.15))
    best(client)
    add(client, uncertain(1.7, 0.2))
    assert best(client) == Promotion(
        1,
        False,
        f"Version 1 of {NAME} stays champion (fd_labels 2.00 ± 0.29). Version 2 is the candidate"
        " (fd_labels 1.70 ± 0.39). That is no significant difference: -0.79 to 0.19 at 95 %.",
    )
    assert aliases(client) == {CHAMPION: 1, CANDIDATE: 2}
    add(client, uncertain(1.4, 0.2))
    assert best(client).champion == 3
    assert aliases(client) == {CHAMPION: 3, PREVIOUS: 1}
    # Of an early release, without an error.
    add(client, 1.3)
    assert best(client).champion == 4


def test_the_best_that_passes_the_check_is_champion(client: MlflowClient) -> None:
    for score in (3.0, 1.0, 2.0):
        add(client, score)
    asked = []

    def check(_: MlflowClient, version: Any, _record: ScoreRecord) -> str:
        asked.append(int(version.version))
        return "it is broken" if int(version.version) == 2 else ""

    assert best(client, check=check).text == (
        f"Version 3 of {NAME} is now champion (fd_labels 2.00). Version 2 cannot be champion: it is broken."
    )
    # No more than it takes.
    assert asked == [2, 3]


def broken(weights: Path) -> Path:
    """The weights with numbers that are not finite."""
    about, state = tensors.read(weights, KIND, "model", "")
    save_model(weights, {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}, about)
    return weights


@pytest.mark.slow
def test_a_version_must_draw_images_in_a_process_of_its_own(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is not so is one clause."""

    def registered(number: int, weights: Path) -> Any:
        run = open_run(client, "digits", TRAINING_HASH, f"hash{number}", f"seed {number}")
        tags = {TRAINING_HASH: f"hash{number}", TURNING_POINTS: "[300]"}
        return register(run, NAME, weights, tags, record(1.0))

    fine = registered(0, small_model(tmp_path / "fine.safetensors"))
    # What our own process sees is no reason for it to work.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.py").write_text("raise SystemExit('not this one')")
    assert draws_images(client, fine, record(1.0)) == ""
    assert client.get_model_version(NAME, fine.version).tags[DRAWS] == "true"
    flat = registered(1, broken(small_model(tmp_path / "flat.safetensors", 1)))
    assert draws_images(client, flat, record(1.0)).startswith("it drew images of one colour")
    for file in tmp_path.glob("mlartifacts/models/*/artifacts/artifacts/*.safetensors"):
        file.write_bytes(b"nonsense")
    said = draws_images(client, flat, record(1.0))
    assert said.startswith("it does not draw in a process of its own (")
    assert "\n" not in said
    monkeypatch.setattr("pipelines.tracking.gate._PATIENCE", 0.01)
    assert draws_images(client, flat, record(1.0)) == "it drew no image within 0 s"


def test_a_version_that_copies_training_images_is_never_promoted(client: MlflowClient) -> None:
    copying = dataclasses.replace(record(0.5), metrics={**record(0.5).metrics, "copies": 0.2})
    number = add(client, copying)
    promotion = promote_best(client, NAME)
    assert promotion.champion is None
    assert promotion.text.startswith(
        f"There is no champion of {NAME}. Version {number} cannot be champion: it copies training images ("
    )


# --- people


def test_a_champion_set_by_hand_stays_until_it_is_released(client: MlflowClient) -> None:
    for score in (2.0, 3.0):
        add(client, score)
    best(client)
    client.set_registered_model_alias(NAME, CHAMPION, "2")
    add(client, 1.0)
    assert best(client) == Promotion(
        2,
        False,
        f"Version 2 of {NAME} stays champion (fd_labels 3.00), as a person set it; `dvdp promote {NAME} --auto`"
        " releases it. Version 3 is the candidate (fd_labels 1.00).",
    )
    assert aliases(client) == {CHAMPION: 2, PREVIOUS: 1, CANDIDATE: 3}
    # Also where it is set back to the one that its score had made champion.
    client.set_registered_model_alias(NAME, CHAMPION, "1")
    assert not best(client).moved
    release(client, NAME)
    assert best(client).champion == 3
    assert aliases(client) == {CHAMPION: 3, PREVIOUS: 1}


def test_a_champion_of_a_store_that_remembers_nothing_was_set_by_a_person(client: MlflowClient) -> None:
    for score in (2.0, 1.0):
        add(client, score)
    client.set_registered_model_alias(NAME, CHAMPION, "1")
    assert not best(client).moved


def test_rollback_undoes_promotions_one_by_one(client: MlflowClient) -> None:
    for number, score in enumerate((3.0, 2.0, 1.0), start=1):
        add(client, score)
        assert best(client).champion == number
    assert rollback(client, NAME).text == (
        f"Version 2 of {NAME} is champion again, in place of version 3, until `dvdp promote {NAME} --auto` releases it."
    )
    assert aliases(client) == {CHAMPION: 2, PREVIOUS: 1}
    assert not best(client).moved
    assert aliases(client) == {CHAMPION: 2, PREVIOUS: 1, CANDIDATE: 3}
    rollback(client, NAME)
    assert aliases(client) == {CHAMPION: 1, CANDIDATE: 3}
    with pytest.raises(UserError, match=f"^MODEL: found no former champion of '{NAME}' to go back to"):
        rollback(client, NAME)


def test_rollback_goes_where_a_person_has_set_previous(client: MlflowClient) -> None:
    for score in (3.0, 2.0, 1.0):
        add(client, score)
        best(client)
    client.set_registered_model_alias(NAME, PREVIOUS, "1")
    assert rollback(client, NAME).champion == 1


def test_a_rejected_champion_goes_and_is_never_promoted_again(client: MlflowClient) -> None:
    for score in (3.0, 1.0):
        add(client, score)
        best(client)
    assert reject(client, NAME, 2, "too dark") == Promotion(
        1, True, f"Version 2 of {NAME} is rejected and never promoted again. Version 1 is champion again."
    )
    assert client.get_model_version(NAME, "2").tags[REJECTED] == "too dark"
    assert aliases(client) == {CHAMPION: 1}
    assert not best(client).moved
    with pytest.raises(UserError, match=r"^VERSION: found 2, which was rejected \('too dark'\), expected another;"):
        pin(client, NAME, 2)
    assert reject(client, NAME, 1, "too light").text.endswith("There is no champion now.")
    assert aliases(client) == {}
    assert best(client).text == f"There is no champion of {NAME}."


def test_a_rejected_version_that_a_person_makes_champion_in_mlflow_is_champion_until_released(
    client: MlflowClient,
) -> None:
    for score in (3.0, 1.0):
        add(client, score)
    reject(client, NAME, 2, "too dark")
    best(client)
    client.set_registered_model_alias(NAME, CHAMPION, "2")
    assert not best(client).moved
    assert aliases(client) == {CHAMPION: 2, PREVIOUS: 1}
    release(client, NAME)
    assert best(client).champion == 1
    assert aliases(client) == {CHAMPION: 1}


def test_a_former_champion_that_was_deleted_is_passed_over(client: MlflowClient) -> None:
    for score in (3.0, 2.0, 1.0):
        add(client, score)
        best(client)
    client.delete_model_version(NAME, "2")
    assert rollback(client, NAME).champion == 1


# --- commands


def test_the_commands_say_what_they_did_or_what_is_wrong_in_one_sentence(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("tracking: {max_score: 2.5}\n")
    for score in (3.0, 2.0, 1.0):
        client.set_model_version_tag(NAME, str(add(client, score)), DRAWS, "true")

    def said(*command: str, status: int = 0) -> str:
        assert main(list(command)) == status
        captured = capsys.readouterr()
        return (captured.err if status else captured.out).strip()

    assert said("promote", NAME, "1") == (
        f"Version 1 of {NAME} is champion until `dvdp promote {NAME} --auto` releases it."
    )
    assert said("promote", NAME, "2").endswith(" Before, it was version 1.")
    assert said("rollback", NAME).startswith(f"Version 1 of {NAME} is champion again, in place of version 2, until")
    assert said("reject", NAME, "3", "--reason", "copies") == (
        f"Version 3 of {NAME} is rejected and never promoted again."
    )
    assert said("promote", NAME, "--auto").startswith(f"Version 2 of {NAME} is now champion")
    assert aliases(client) == {CHAMPION: 2, PREVIOUS: 1}
    wrong = {
        ("promote", NAME): "dvdp: VERSION: found none and no --auto, expected one of them;",
        ("promote", NAME, "1", "--auto"): "dvdp: VERSION: found --auto beside it, expected one of them;",
        ("promote", NAME, "7"): f"dvdp: VERSION: found 7, which is no version of '{NAME}', expected one of 1-3.",
        ("promote", NAME, "3"): "dvdp: VERSION: found 3, which was rejected ('copies'), expected another;",
        ("promote", "other", "1"): f"dvdp: MODEL: found no registered model 'other', expected one of {NAME}.",
        ("rollback", "other"): f"dvdp: MODEL: found no registered model 'other', expected one of {NAME}.",
        ("reject", NAME, "1", "--reason", " "): "dvdp: --reason: found nothing, expected why",
        ("reject", NAME, "1"): "dvdp: Missing option '--reason'",
    }
    for command, sentence in wrong.items():
        assert said(*command, status=2).startswith(sentence), command
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "mlflow.db").unlink()
    assert said("rollback", NAME, status=2).startswith("dvdp: MLflow: found no mlflow.db here and no server")


@pytest.mark.slow
def test_the_commands_work_over_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = empty_store(tmp_path)
    client.create_registered_model(NAME)
    for score in (2.0, 1.0):
        client.set_model_version_tag(NAME, str(add(client, score)), DRAWS, "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("{}\n")
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with mlflow_server(tmp_path, port):
        for command, expected in (
            (["promote", NAME, "1"], {CHAMPION: 1}),
            (["promote", NAME, "--auto"], {CHAMPION: 2, PREVIOUS: 1}),
            (["rollback", NAME], {CHAMPION: 1}),
            (["reject", NAME, "1", "--reason", "too dark"], {}),
            (["promote", NAME, "--auto"], {CHAMPION: 2}),
        ):
            assert main(command) == 0
            assert aliases(client) == expected, command
        assert main(["promote", "other", "1"]) == 2
    assert f"dvdp: MODEL: found no registered model 'other', expected one of {NAME}." in capsys.readouterr().err


# --- every order of events


@functools.lru_cache(maxsize=1)
def _shared() -> MlflowClient:
    return empty_store(Path(tempfile.mkdtemp(prefix="dvdp-test-champion-")))


SCORES = st.sampled_from([1.0, 2.0, 3.0, 4.0])
_names = iter(range(10**6))


class Registry(RuleBasedStateMachine):
    """Events in any order, beside a model that is a list of champions and a few sets."""

    @initialize()
    def start(self) -> None:
        self.client, self.name = _shared(), f"model-{next(_names)}"
        self.client.create_registered_model(self.name)
        self.scores: dict[int, float] = {}
        self.broken: set[int] = set()
        self.rejected: set[int] = set()
        self.champions: list[int] = []
        self.pinned = False
        self.seen = True

    def check(self, _: MlflowClient, version: Any, _record: ScoreRecord) -> str:
        return "it is broken" if int(version.version) in self.broken else ""

    def look(self) -> Promotion:
        return promote_best(self.client, self.name, 3.5, self.check)

    def known(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(set(self.scores) - self.rejected)))

    def some(self) -> bool:
        return bool(set(self.scores) - self.rejected)

    def promoted(self, number: int) -> None:
        if self.champions[-1:] != [number]:
            self.champions.append(number)

    @rule(score=SCORES, broken=st.booleans())
    def register(self, score: float, broken: bool) -> None:
        number = add(self.client, score, self.name)
        self.scores[number] = score
        if broken:
            self.broken.add(number)

    @precondition(lambda self: self.scores)
    @rule()
    def run_ends(self) -> None:
        before = self.champions[-1] if self.champions else None
        said = self.look()
        fit = {n for n in self.scores if self.scores[n] <= 3.5} - self.rejected - self.broken
        rivals = {n for n in fit if before is None or self.scores[n] < self.scores[before]}
        expected = min(rivals, key=lambda n: (self.scores[n], -n), default=None)
        if expected is not None and not self.pinned:
            self.promoted(expected)
            assert said.moved
            assert CANDIDATE not in aliases(self.client, self.name)
        else:
            assert not said.moved
            assert aliases(self.client, self.name).get(CANDIDATE) == expected
        self.seen = True

    @precondition(some)
    @rule(data=st.data())
    def set_by_hand(self, data: st.DataObject) -> None:
        number = self.known(data)
        if self.champions[-1:] != [number]:
            self.client.set_registered_model_alias(self.name, CHAMPION, str(number))
            if not self.seen and len(self.champions) > 1:
                # Nobody has looked in between.
                self.champions.pop()
            self.promoted(number)
            self.pinned, self.seen = True, False

    @precondition(lambda self: self.some() and self.seen)
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        number = self.known(data)
        before = aliases(self.client, self.name), list(self.champions), self.pinned
        pin(self.client, self.name, number)
        self.promoted(number)
        self.pinned = True
        if len(before[1]) and data.draw(st.booleans()) and len(self.champions) > len(before[1]):
            rollback(self.client, self.name)
            self.champions = before[1]
            now = aliases(self.client, self.name)
            assert {a: now.get(a) for a in (CHAMPION, PREVIOUS)} == {a: before[0].get(a) for a in (CHAMPION, PREVIOUS)}

    @precondition(lambda self: self.seen and len(self.champions) > 1)
    @rule()
    def roll_back(self) -> None:
        self.champions.pop()
        assert rollback(self.client, self.name).champion == self.champions[-1]
        self.pinned = True

    @precondition(lambda self: self.seen and self.some())
    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        number = self.known(data)
        was = self.champions[-1:] == [number]
        reject(self.client, self.name, number, "for a reason")
        self.rejected.add(number)
        left: list[int] = []
        for one in self.champions:
            if one != number and left[-1:] != [one]:
                left.append(one)
        self.champions = left
        self.pinned = self.pinned and not was

    @precondition(lambda self: self.seen)
    @rule()
    def release(self) -> None:
        release(self.client, self.name)
        self.pinned = False

    @invariant()
    def aliases_are_as_they_should_be(self) -> None:
        if not self.seen:
            return
        now = aliases(self.client, self.name)
        assert now.get(CHAMPION) == (self.champions[-1] if self.champions else None)
        assert now.get(PREVIOUS) == (self.champions[-2] if len(self.champions) > 1 else None)
        assert now.get(PREVIOUS) is None or now[PREVIOUS] != now[CHAMPION]
        assert now.get(CANDIDATE) is None or now[CANDIDATE] != now.get(CHAMPION)
        assert not self.rejected & set(now.values())


Registry.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
test_people_are_obeyed_in_every_order_of_events = Registry.TestCase
