"""``dvdp import``: from files of other libraries to a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from pipelines.cli import main
from tests.models.test_foreign import ARGUMENTS, diffusers_folder, guided_state


def test_both_kinds_become_model_files_that_are_drawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(guided_state(), "model.pt")
    diffusers_folder(Path("unet"), guided_state())
    Path("flags.yaml").write_text(yaml.safe_dump({**ARGUMENTS, "use_new_attention_order": True}))
    assert main(["import", "model.pt", "--arguments", "flags.yaml", "--out", "one.safetensors"]) == 0
    assert "one.safetensors: 8 px, unconditional, epsilon, T = 1000, linear; `dvdp draw" in capsys.readouterr().out
    assert main(["import", "unet", "--out", "two.safetensors"]) == 0
    for name in ("one", "two"):
        assert main(["draw", f"{name}.safetensors", "--count", "1", "--steps", "2", "--out", f"{name}.png"]) == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes(), "the same network"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["none.pt"], "dvdp: import: found no file 'none.pt', expected a checkpoint (.pt or .safetensors)."),
        (["none.pt", "--arguments", "no.yaml"], "dvdp: --arguments: found no file 'no.yaml', expected YAML"),
        (["none.pt", "--arguments", "list.yaml"], "dvdp: --arguments: found no keys in 'list.yaml'"),
        (["none.pt", "--out", "no/such/"], "dvdp: "),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("[1, 2]")
    assert main(["import", *command]) == 2
    assert capsys.readouterr().err.startswith(sentence)
