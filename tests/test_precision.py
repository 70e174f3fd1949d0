"""Which precision a machine trains in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dvdp import precision
from dvdp.config import Run, parse_params
from dvdp.errors import UserError
from dvdp.identity import training_hash
from dvdp.precision import BF16_INSTRUCTIONS, cpu_instructions, fastest_precision

#: Beginnings of /proc/cpuinfo, shortened: Intel with AMX, AMD of 2022, ARM; Intel, AMD and ARM before.
WITH_BF16 = [
    "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\nbugs\t\t: x\n",
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\n",
    "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve i8mm bf16 dgh\n",
]
WITHOUT = [
    "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t: amx_bf16\n",
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n",
    "processor\t: 0\nFeatures\t: fp asimd svebf16x\n",
    "processor\t: 0\n",
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes this machine's CPU that of a text of Linux."""

    def become(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(precision, "cpu_instructions", lambda: cpu_instructions(tmp_path / "cpuinfo"))

    return become


@pytest.mark.parametrize("text", WITH_BF16)
def test_a_cpu_with_bf16_instructions_trains_in_bf16(text: str, machine: Callable[[str], None]) -> None:
    machine(text)
    assert fastest_precision(gpu=False) == "bf16"


@pytest.mark.parametrize("text", WITHOUT)
def test_a_cpu_without_bf16_instructions_trains_in_fp32_and_a_gpu_in_bf16(
    text: str, machine: Callable[[str], None]
) -> None:
    machine(text)
    assert fastest_precision(gpu=False) == "fp32"
    assert fastest_precision(gpu=True) == "bf16"


def test_elsewhere_than_on_linux_torch_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"architecture": "arm64", "neon": True, "bf16": True, "sve": False, "l1d_cache_size": 49152}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed)
    assert cpu_instructions(tmp_path / "missing") == {"neon", "bf16"}
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_instructions(tmp_path / "missing") == set()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_linux_and_torch_agree_on_this_cpu() -> None:
    assert cpu_instructions() & BF16_INSTRUCTIONS == cpu_instructions(Path("missing")) & BF16_INSTRUCTIONS


def _run(tree: Mapping[str, Any]) -> Run:
    return parse_params({"settings": {"ddpm": {"process": "ddpm"}}, **tree}).runs()[0]


def test_a_run_records_the_precision_that_auto_was_and_its_hash_is_that_of_the_precision(
    machine: Callable[[str], None],
) -> None:
    hashes = {}
    for text, expected in ((WITHOUT[0], "fp32"), (WITH_BF16[0], "bf16")):
        machine(text)
        auto, said = _run({}), _run({"training": {"precision": expected}})
        assert auto == said
        assert auto.describe()["training"]["precision"] == expected
        assert Run.from_description(auto.describe()) == auto
        hashes[expected] = training_hash(auto, "digest", False)
    assert hashes["fp32"] != hashes["bf16"]
    machine(WITHOUT[0])
    assert _run({"cluster": {"gpu": True}}).training.precision == "bf16"
    override = {"process": "ddpm", "overrides": {"training": {"precision": "bf16"}}}
    assert _run({"settings": {"ddpm": override}}).training.precision == "bf16"


def test_a_description_whose_precision_was_never_resolved_is_refused() -> None:
    description = _run({}).describe()
    description["training"]["precision"] = "auto"
    with pytest.raises(UserError, match=r"training\.precision: found 'auto' in a run, expected fp32 or bf16"):
        Run.from_description(description)
