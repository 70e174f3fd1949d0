"""MLflow takes what names from outside there are, and shows as much of a text as it has space for."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from dvdp.errors import UserError
from dvdp.models.export import load_model
from dvdp.text import LABEL, shown
from pipelines.provenance import GIT_COMMIT
from pipelines.tracking.descriptions import DEVICE, model_card
from pipelines.tracking.registry import register
from pipelines.tracking.runs import TRAINING_HASH, adopt, open_run
from tests.reports.study import study
from tests.tracking.support import empty_store, small_model

ODD = [os.fsdecode(b"caf\xe9"), "a\nb", "<b>|*x*", "$x$", "x" * 5000, "7", "猫", "\u202ex"]


def test_tags_params_and_texts_of_any_characters_are_taken(tmp_path: Path) -> None:
    client = empty_store(tmp_path)
    for experiment in ("a|b <i>'", "猫"):
        run = open_run(client, experiment, TRAINING_HASH, "0" * 12, "a")
        run.set_tags({f"odd{i}": text for i, text in enumerate(ODD)})
        run.log_params({f"odd{i}": text for i, text in enumerate(ODD)})
        run.log_json("odd.json", ODD)
        data = client.get_run(run.run_id).data
        for known in (data.tags, data.params):
            assert [known[f"odd{i}"] for i in range(len(ODD))] == [r"caf\udce9", *ODD[1:]]
        assert open_run(client, experiment, TRAINING_HASH, "0" * 12, "a") == run


def test_the_description_of_many_settings_is_cut_between_lines(tmp_path: Path) -> None:
    client = empty_store(tmp_path)
    parent, child = (open_run(client, "x", TRAINING_HASH, name, name) for name in ("parent", "child"))
    for count, whole in ((5, True), (300, False)):
        adopt(parent, {f"setting-{i:03d}": child for i in range(count)}, "| table |")
        note = client.get_run(parent.run_id).data.tags["mlflow.note.content"]
        assert len(note) <= 8000
        assert note.startswith("| table |\n")
        assert (note.splitlines()[-1] != "…") == whole
        assert not whole or note.endswith(f"- [setting-004](#/experiments/{child.experiment_id}/runs/{child.run_id})")


MARKUP = "<img src=x onerror=alert(1)> [x](javascript:alert(1)) ![y](z) `c` {{ 7 * 7 }} **b** | c"


def as_shown(text: str) -> list[Token]:
    """What Markdown makes of a text, flat, with HTML and tables as MLflow's pages take them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [each for token in tokens for each in (token, *(token.children or ()))]


def test_what_others_wrote_is_text_in_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = empty_store(tmp_path)
    parent, child = (open_run(client, "x", TRAINING_HASH, name, name) for name in ("parent", "child"))
    adopt(parent, {MARKUP: child, "# a": child})
    note = client.get_run(parent.run_id).data.tags["mlflow.note.content"]

    result = study(tmp_path)[0]
    odd = dataclasses.replace(result.record, warnings=[MARKUP, "# heading", "1. item"])
    child.set_tags({GIT_COMMIT: MARKUP, DEVICE: MARKUP})
    version = ModelVersion("dvdp-digits", "1", 0, tags=[ModelVersionTag(TRAINING_HASH, MARKUP)])
    card = model_card(result.job, odd, child, version, "pictures/a.png")
    for text, links, pictures, times in ((note, 3, 0, 1), (card, 1, 1, 4)):
        tokens = as_shown(text)
        kinds = [token.type for token in tokens]
        assert not {"html_block", "html_inline", "heading_open", "ordered_list_open"} & set(kinds)
        assert (kinds.count("link_open"), kinds.count("image")) == (links, pictures)
        assert "".join(token.content for token in tokens if token.type == "text").count("{{ 7 * 7 }}") == times


def test_a_model_is_registered_and_drawn_from_with_odd_labels(tmp_path: Path) -> None:
    client, labels = empty_store(tmp_path), [shown(label, LABEL) for label in ODD]
    weights = small_model(tmp_path / "weights.safetensors", labels=labels)
    run = open_run(client, "x", TRAINING_HASH, "0" * 12, "a")
    version = register(run, "dvdp-odd", weights, {TRAINING_HASH: "0" * 12})
    assert version.status == "READY"
    model = load_model(weights)
    for label in labels:
        assert model.sample(1, label=label).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match=r"found 'caf\\xe8' \(did you mean 'caf\\xe9'\?\), expected one of"):
        model.sample(1, label=r"caf\xe8")
