"""Kernels of a GPU, without one: what they compute, by Triton's interpreter, and that they compile for real cards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dvdp.models.norms import group_norm_silu

pytest.importorskip("triton")

#: Images, channels, groups, height, width: groups of a power of two and others, more channels than a program has.
SHAPES = [
    (2, 8, 2, 3, 5),
    (3, 24, 8, 4, 4),
    (2, 96, 24, 7, 3),
    (1, 192, 32, 9, 9),
    (2, 64, 16, 16, 16),
    (1, 2048, 32, 2, 3),
]

INTERPRETED = """
from tests.models.test_norm_kernels import check_all
check_all()
"""


def check_all() -> None:
    """Compare the interpreted kernels with autograd in double precision."""
    from dvdp.models import norm_kernels

    torch.manual_seed(0)
    for place, (b, channels, groups, h, w) in enumerate(SHAPES):
        modulated, silu, dtype = bool(place % 2), place != 1, torch.bfloat16 if place == 3 else torch.float32
        # Far from 0, where squares of single precision lose most.
        far = 30 * torch.randn(channels)[:, None, None]
        x = (torch.randn(b, channels, h, w) + far).to(dtype).contiguous(memory_format=torch.channels_last)
        dy = torch.randn(b, channels, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(channels), torch.randn(channels)
        # Of a wider product, as the network makes it.
        modulation = torch.randn(b, 3 * channels).to(dtype)[:, channels:] if modulated else None
        y, mean, rstd = norm_kernels.forward(x, weight, bias, modulation, groups, 1e-5, silu)
        found = norm_kernels.backward(dy, x, weight, bias, modulation, mean, rstd, groups, silu)
        inputs = [t.double().requires_grad_() for t in (x, weight, bias, modulation) if t is not None]
        exact = reference(*inputs, groups=groups, silu=silu)
        wanted = torch.autograd.grad(exact, inputs, dy.double())
        tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
        for got, want in zip((y, *found), (exact, *wanted), strict=False):
            error = (got.double() - want).norm() / want.norm()
            assert error < tolerance, (SHAPES[place], float(error))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert found[0].is_contiguous(memory_format=torch.channels_last)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None = None, *, groups: int, silu: bool
) -> Tensor:
    h = F.group_norm(x, groups, weight, bias, 1e-5)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    return F.silu(h) if silu else h


def test_the_kernels_compute_norm_modulation_and_silu_and_their_gradients() -> None:
    # Triton decides when it is imported whether it interprets.
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dvdp.models import norm_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, sizes = norm_kernels._launch(24, 128, 32, torch.empty(24, 256), silu=True)
    only = {"PART": norm_kernels.PART, "MODULATED": True}
    for kernel, constants in (
        (norm_kernels.forward_kernel, sizes),
        (norm_kernels.backward_kernel, sizes),
        (norm_kernels.weights_kernel, only),
    ):
        types = {"eps": "fp32", "pixels": "i32", "channels": "i32", "images": "i32", "stride": "i32"}
        in_fp32 = {
            "weight_ptr",
            "bias_ptr",
            "mean_ptr",
            "rstd_ptr",
            "sum_ptr",
            "product_ptr",
            "dweight_ptr",
            "dbias_ptr",
        }
        signature = {
            name: types.get(name, "*fp32" if name in in_fp32 else f"*{dtype}")
            for name in kernel.arg_names
            if name not in constants
        }
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            kernel, signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert f"sm_{capability}" in compiled.asm["ptx"]


def test_the_operators_gradients_have_the_shapes_of_what_they_are_of() -> None:
    x, weight, modulation = (torch.empty(s, device="meta", requires_grad=True) for s in ((2, 8, 4, 4), (8,), (2, 16)))
    bias = torch.empty(8, device="meta", requires_grad=True)
    y, mean, _ = group_norm_silu(x, weight, bias, modulation, 2, 1e-5, True)
    assert (y.shape, mean.shape) == (x.shape, (2, 8))
    y.sum().backward()
    for tensor in (x, weight, bias, modulation):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
