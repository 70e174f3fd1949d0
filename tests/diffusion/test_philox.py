"""The generator behind the noise of images: its bits, its normal numbers, and its CUDA kernel without a GPU."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from dvdp.diffusion import philox
from dvdp.diffusion.randomness import ImageNoise

KERNEL = Path(philox.__file__).with_name("philox_cuda.py")
KEYS = torch.tensor([801287590894671215, 0, 2**63 - 1])


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """A block, from the paper's equations."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b % 2**64, (a >> 64) ^ c3 ^ k1, a % 2**64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0] * 6, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ([2**64 - 1] * 6, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            [
                0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89,
                0x452821E638D01377, 0xBE5466CF34E90C6C,
            ],
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_blocks_are_those_that_its_authors_published(numbers: list[int], expected: str) -> None:
    """Of Random123's ``kat_vectors``: what the other tests compare with."""
    assert [f"{word:016x}" for word in philox_4x64_10(numbers[:4], numbers[4:])] == expected.split()


@pytest.mark.parametrize(("draw", "size"), [(0, 16), (7, 48), (2**31 - 1, 96)])
def test_numbers_are_the_blocks_by_box_and_muller(draw: int, size: int) -> None:
    expected = []
    for key in KEYS.tolist():
        words = [w for block in range(size // 8) for w in philox_4x64_10([block + 1, draw, 0, 0], [key, 0])]
        signed = [(half ^ 2**31) - 2**31 for word in words for half in (word % 2**32, word >> 32)]
        radii = [math.sqrt(-2 * math.log(abs(n / 2**31) + 2**-32)) for n in signed[: size // 2]]
        angles = [n / 2**31 * math.pi for n in signed[size // 2 :]]
        expected.append([r * part(a) for part in (math.sin, math.cos) for r, a in zip(radii, angles, strict=True)])
    found = philox.normal(KEYS, draw, size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_numbers_are_finite_where_the_bits_are_extreme(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)]).repeat_interleave(5).repeat(1, 2).to(torch.float32) / 2**31
    bits[:, 25:] = bits[:, :25].reshape(5, 5).T.flatten()
    monkeypatch.setattr(philox, "_uniform", lambda keys, draw, size: bits.clone())
    found = philox.normal(KEYS[:1], 0, 50)
    assert found.isfinite().all()
    assert found.abs().max() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)


def test_numbers_are_normal_and_independent() -> None:
    numbers = torch.stack([philox.normal(torch.arange(40), draw, 3072) for draw in range(5)])
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3
    # The tails too: beyond 4 std lie 39 of 614,400.
    assert int((numbers.abs() > 4).sum()) == pytest.approx(39, abs=4 * 39**0.5)
    rows = numbers.flatten(0, 1)
    for values in (rows, rows.abs(), rows.square()):
        between = torch.corrcoef(values) - torch.eye(len(rows))
        assert between.abs().max() < 6 / 3072**0.5
    # Sine and cosine of an angle, and neighbours.
    for shift in (1, 8, 1536):
        for values in (rows, rows.square()):
            both = torch.stack([values, values.roll(shift, 1)]).flatten(1)
            assert abs(torch.corrcoef(both)[0, 1]) < 5 / rows.numel() ** 0.5


def test_operator_has_a_schema_and_shapes_that_hold() -> None:
    # Without the check of gradients, of which it has none: it starts threads, and other tests fork.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dvdp.normal.default, (KEYS, 3, 48), test_utils=checks)


def test_noise_for_a_gpu_is_on_the_gpu() -> None:
    """With tensors that have a device and no numbers."""
    with FakeTensorMode():
        noise = ImageNoise(0, 5, 2, device="cuda").normal((3, 5, 7), torch.float64)
    assert (noise.shape, noise.dtype, noise.device.type) == ((2, 3, 5, 7), torch.float64, "cuda")


def test_cuda_without_triton_gets_the_numbers_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dvdp.diffusion.philox_cuda", raising=False)
    monkeypatch.delattr("dvdp.diffusion.philox_cuda", raising=False)
    assert torch.equal(philox._on_cuda(KEYS, 3, 48), philox.normal(KEYS, 3, 48))


def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the kernel, run on the CPU by Triton's interpreter."""
    pytest.importorskip("triton", reason="this build of torch has no Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("interpreted", KERNEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("draw", "size"), [(0, 16), (1, 48), (2**31 - 1, 3072), (16, 3 * 40 * 40)])
def test_kernel_draws_the_numbers_of_the_cpu(draw: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = interpreted(monkeypatch).normal(KEYS, draw, size)
    torch.testing.assert_close(found, philox.normal(KEYS, draw, size), rtol=0, atol=1e-6)


def test_kernel_fills_no_rows_if_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreted(monkeypatch).normal(KEYS[:0], 0, 16).shape == (0, 16)


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernel_compiles_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100, a 4090 and an H200."""
    triton = pytest.importorskip("triton", reason="this build of torch has no Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        assert triton.knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(str(error))
    from dvdp.diffusion.philox_cuda import BLOCKS, normal_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"out": "*fp32", "keys": "*i64", "draw": "i32", "half": "i32", "BLOCKS": "constexpr"}
    compiled = triton.compile(
        ASTSource(normal_kernel, types, {"BLOCKS": BLOCKS}),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": False},
    )
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    # Approximations would differ from a CPU by more than last bits.
    assert "approx" not in compiled.asm["ptx"]
