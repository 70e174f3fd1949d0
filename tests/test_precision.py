"""Which precision a machine trains in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dvdp import precision
from dvdp.config import Run, parse_params
from dvdp.errors import UserError
from dvdp.identity import training_hash
from dvdp.precision import cpu_capabilities, fastest_precision

#: As torch 2.15 lists them, of an Intel CPU with AMX, an AMD one of 2022, an ARM one, and Intel and AMD ones before.
WITH_BF16 = [
    {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_tile": True, "amx_bf16": True},
    {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False},
    {"architecture": "arm64", "neon": True, "bf16": True, "sve": False},
]
WITHOUT = [
    {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_vnni": True, "avx512_bf16": False},
    {"architecture": "x86_64", "avx2": True},
    {"architecture": "arm64", "neon": True, "bf16": False},
    {},
]


@pytest.mark.parametrize("capabilities", WITH_BF16)
def test_a_cpu_with_bf16_instructions_trains_in_bf16(
    capabilities: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: capabilities)
    assert fastest_precision(gpu=False) == "bf16"


@pytest.mark.parametrize("capabilities", WITHOUT)
def test_a_cpu_without_bf16_instructions_trains_in_fp32_and_a_gpu_in_bf16(
    capabilities: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: capabilities)
    assert fastest_precision(gpu=False) == "fp32"
    assert fastest_precision(gpu=True) == "bf16"


def test_torch_lists_the_instructions_and_an_older_one_those_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "architecture" in cpu_capabilities()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert cpu_capabilities() == {"avx512_bf16": True}


def _run(tree: Mapping[str, Any]) -> Run:
    return parse_params({"settings": [{"name": "ddpm", "process": "ddpm"}], **tree}).runs()[0]


def test_a_run_records_the_precision_that_auto_was_and_its_hash_is_that_of_the_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashes = {}
    for capabilities, expected in ((WITHOUT[0], "fp32"), (WITH_BF16[0], "bf16")):
        monkeypatch.setattr(precision, "cpu_capabilities", lambda found=capabilities: found)
        auto, said = _run({}), _run({"training": {"precision": expected}})
        assert auto == said
        assert auto.describe()["training"]["precision"] == expected
        assert Run.from_description(auto.describe()) == auto
        hashes[expected] = training_hash(auto, "digest", False, 1)
    assert hashes["fp32"] != hashes["bf16"]
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: WITHOUT[0])
    assert _run({"cluster": {"gpu": True}}).training.precision == "bf16"
    override = {"name": "ddpm", "process": "ddpm", "overrides": {"training": {"precision": "bf16"}}}
    assert _run({"settings": [override]}).training.precision == "bf16"


def test_a_description_whose_precision_was_never_resolved_is_refused() -> None:
    description = _run({}).describe()
    description["training"]["precision"] = "auto"
    with pytest.raises(UserError, match=r"training\.precision: found 'auto' in a run, expected fp32 or bf16"):
        Run.from_description(description)
