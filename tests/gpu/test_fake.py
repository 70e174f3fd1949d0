"""The fake GPU itself: it finds what a real one would refuse or wait for, and counts what it would launch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.fake import FakeGpu, fake_gpu
from benchmarks.gpu.kernels import launches_of_lists
from tests.gpu.support import GPU


def operators(gpu: FakeGpu) -> list[str]:
    return [launch.kernel.operator for launch in gpu.launches]


def test_tensors_of_two_devices_do_not_meet() -> None:
    with fake_gpu():
        table, index = torch.arange(2.0), torch.zeros(2, dtype=torch.long, device=GPU)
        with pytest.raises(RuntimeError, match="device"):
            table + index
        with pytest.raises(RuntimeError, match="device"):
            table[index]
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=GPU, generator=torch.Generator())
        assert torch.randn(3, device=GPU, generator=torch.Generator("cuda")).device == GPU


def test_the_process_is_as_before_when_it_ends() -> None:
    with fake_gpu():
        assert torch.cuda.is_available()
        weight = torch.ones(3, device=GPU, requires_grad=True)
        (weight * 2).sum().backward()
        assert weight.grad is not None
        real = torch.full((2,), 3.0, requires_grad=True)
        (real * real).sum().backward()
        assert real.grad is not None
        assert real.grad.tolist() == [6.0, 6.0], "the CPU computes within it"
    assert not torch.cuda.is_available()
    x = torch.full((2,), 3.0, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [6.0, 6.0]
    assert isinstance(torch.Generator(), torch.Generator)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device=GPU)


def test_copies_and_waits_are_noted() -> None:
    with fake_gpu() as gpu:
        host = torch.zeros(256)
        there = host.to(GPU)
        assert [(copy.to_host, copy.size, copy.pinned) for copy in gpu.copies] == [(False, 1024, False)]
        assert [wait.what for wait in gpu.waits] == ["copy from the host"], "from pageable memory"
        gpu.reset()
        host.pin_memory()[:128].to(GPU, non_blocking=True)
        assert [copy.pinned for copy in gpu.copies] == [True]
        assert not gpu.waits
        assert bool(there.sum() > 0)
        assert there.cpu().device.type == "cpu"
        assert there.to("cpu", non_blocking=True).is_pinned()
        host.copy_(there)
        torch.cuda.current_stream().synchronize()
        torch.tensor([1.0, 2.0], device=GPU)
        whats = ["item", "copy to the host", "copy to the host", "synchronize", "copy from the host"]
        assert [wait.what for wait in gpu.waits] == whats


def test_a_convolution_and_a_group_norm_are_several_kernels() -> None:
    with fake_gpu() as gpu:
        x = torch.ones(2, 8, 4, 4, device=GPU, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = torch.ones(16, 8, 3, 3, device=GPU, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        bias = torch.ones(16, device=GPU, dtype=torch.bfloat16)
        gpu.reset()
        y = F.conv2d(x, weight, bias, padding=1)
        assert operators(gpu) == ["convolution", "convolution, bias"]
        assert gpu.launches[0].kernel[1:4] == (512 + 2304, 1024, 2 * 9 * 8 * 16 * 32)
        assert gpu.launches[1].kernel[1:3] == (1024 + 32, 1024)
        gpu.reset()
        F.conv2d(x.contiguous(), weight, padding=1)
        assert operators(gpu) == ["clone", "convolution, layout", "convolution"]
        gpu.reset()
        F.group_norm(y, 4)
        assert operators(gpu)[-2:] == ["group norm, statistics", "group norm, apply"]
        assert gpu.launches[-2].kernel.read == gpu.launches[-1].kernel.read == 1024
        gpu.reset()
        y.mul_(2).copy_(y)
        assert [launch.kernel[1:3] for launch in gpu.launches] == [(1024, 1024)] * 2


def test_gradients_are_put_down_to_the_line_of_the_forward_pass() -> None:
    from dvdp.diffusion.bands import up

    with fake_gpu() as gpu:
        x = torch.ones(1, 3, 4, 4, device=GPU, requires_grad=True)
        y = up(x).sum()
        gpu.reset()
        y.backward()
    lines = {launch.line for launch in gpu.launches if launch.kernel.operator == "upsample_nearest2d_backward"}
    assert [(line.function, line.backward) for line in lines] == [("dvdp/diffusion/bands.py up", True)]


def test_lists_of_tensors_take_few_launches() -> None:
    assert launches_of_lists([10] * 36, lists=4) == 1
    assert launches_of_lists([10] * 37, lists=4) == 2
    assert launches_of_lists([65536 * 320], lists=1) == 1
    assert launches_of_lists([65536 * 320 + 1], lists=1) == 2
    with fake_gpu() as gpu:
        weights = [torch.ones(10, device=GPU) for _ in range(100)]
        gpu.reset()
        torch._foreach_lerp_(weights, [torch.zeros_like(w) for w in weights], 0.5)
        assert (
            sum(k.launches for k in (launch.kernel for launch in gpu.launches) if k.operator == "_foreach_lerp_") == 2
        )


def test_a_module_goes_to_channels_last_with_its_parameters_in_their_places() -> None:
    with fake_gpu() as gpu:
        network = nn.Conv2d(4, 4, 3).to(GPU)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        weight = network.weight
        network.to(memory_format=torch.channels_last)
        assert network.weight is weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        network(torch.ones(1, 4, 8, 8, device=GPU)).sum().backward()
        optimizer.step()
        assert optimizer.state[weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
        assert not [wait for wait in gpu.waits if wait.what != "copy from the host"]
        gpu.reset()
        network.to(torch.bfloat16)
        assert weight.dtype == torch.bfloat16


def test_an_operator_of_ours_is_one_kernel_unless_the_table_says_more() -> None:
    with torch.library._scoped_library("fake_gpu_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        torch.library.register_fake("fake_gpu_test::twice", torch.empty_like, lib=library)
        with fake_gpu() as gpu:
            x = torch.ones(8, device=GPU)
            gpu.reset()
            torch.ops.fake_gpu_test.twice(x)
            ((kernel, *_),) = gpu.launches
            assert kernel[:3] == ("fake_gpu_test::twice", 32, 32)
