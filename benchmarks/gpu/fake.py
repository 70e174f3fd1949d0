"""A GPU that is not there: tensors on "cuda" have shape, type, strides and device, and no numbers.

    with fake_gpu() as gpu:
        training = Training(run, images, folder, "hash", False, torch.device("cuda:0"), None)
        training.step(0, pixels)
    print(gpu.launches, gpu.waits)

Whatever runs on the CPU runs as it does. Whatever touches "cuda" goes through torch's FakeTensorMode, which raises
where a GPU would (tensors on two devices, shapes and types that no kernel takes) and computes nothing. Every kernel is
noted with its bytes and FLOPs (:mod:`benchmarks.gpu.kernels`), every copy between host and GPU, and everything that
makes the host wait, each with the innermost line of ours that caused it; of the backward pass, the line of the forward
pass. Numbers that come back to the host are ones.

What it cannot say: whether memory suffices, what streams race for, what a compiler makes of the network, NCCL. Streams,
events and the state of random generators do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.gpu.kernels import Kernel, kernels, leaves

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
#: Folders whose lines launches are put down to, and the files that only look on.
_OURS = tuple(f"{ROOT / folder}/" for folder in ("dvdp", "pipelines", "benchmarks"))
_ONLOOKERS = {__file__, str(Path(__file__).with_name("kernels.py"))}


class Line(NamedTuple):
    """A place in the source."""

    function: str
    """File and qualified name, e.g. ``dvdp/models/unet.py UNet.forward``; what stays when code moves."""
    number: int
    backward: bool = False
    """Whether it was the gradient of what the line computed."""


class Launch(NamedTuple):
    """A kernel with the line that caused it."""

    kernel: Kernel
    line: Line
    graphed: bool = False
    """Whether a CUDA graph launched it, with others."""


class Copy(NamedTuple):
    """From the host to the GPU or back."""

    to_host: bool
    size: int
    """Bytes."""
    pinned: bool
    """Whether the memory of the host is."""
    line: Line


class Wait(NamedTuple):
    """What the host waited for until all work given to the GPU was done."""

    what: str
    line: Line


class FakeGpu(TorchDispatchMode):
    """What was done on the GPU since :meth:`reset`, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.copies: list[Copy] = []
        self.waits: list[Wait] = []
        self.replays = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        #: Lines of the forward pass by the number of their autograd node.
        self._lines: dict[int, Line] = {}
        #: By the addresses of their memory.
        self._pinned: dict[int, Tensor] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._known: dict[Any, _Known] = {}

    def reset(self) -> None:
        """Forget what was noted."""
        self.launches, self.copies, self.waits = [], [], []
        self.replays = 0

    @property
    def kernels(self) -> int:
        """Number of kernels, whoever launched them."""
        return sum(launch.kernel.launches for launch in self.launches)

    @property
    def launched(self) -> int:
        """How often the host launched something: a kernel, or a CUDA graph."""
        return self.replays + sum(launch.kernel.launches for launch in self.launches if not launch.graphed)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator of numbers; that of a GPU is a CPU's, as fake tensors draw none."""
        made = _REAL_GENERATOR("cpu")
        if torch.device(device).type == "cuda":
            self._generators[made._cdata] = made  # type: ignore[attr-defined]
        return made

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor in what counts as pinned memory, as long as this object lives."""
        copy = tensor.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether it, or what it is a view of, was pinned."""
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def wait(self, what: str) -> None:
        """Note that the host waits."""
        self.waits.append(Wait(what, self._line()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # By far the most frequent.
            return args[0].fake_device
        kwargs = kwargs or {}
        arguments = leaves((args, kwargs))
        if not any(_is_on_gpu(leaf) for leaf in arguments):
            return func(*args, **kwargs)
        given = [leaf for leaf in arguments if isinstance(leaf, Tensor)]
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return True if given[0].dtype == torch.bool else 1.0 if given[0].dtype.is_floating_point else 1
        if func is aten.equal.default:
            self.wait("equal")
            return True
        _check(func, args, kwargs.get("generator"), self._generators)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._copied(args[0], args[1], to_host=True, waits=not (len(args) > 2 and args[2]))
            return args[0].fill_(1)
        key = _key_of(func, args, kwargs, given)
        if key is not None and (known := self._known.get(key)) is not None:
            self._launched(known.kernels, self._line())
            return known.made(self._fake)
        # As the mode would be asked to if it were entered, which takes as long again.
        out = self._fake.dispatch(func, types, args, kwargs)
        if func in (aten.convolution.default, aten.convolution_backward.default):
            with self._fake:
                out = _in_layout(out, given)
        made = [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]
        if any(t.device.type == "cpu" for t in made):
            return self._to_host(out, given, waits=not kwargs.get("non_blocking"))
        on_host = [t for t in given if t.device.type == "cpu"]
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        for tensor in on_host:
            # Others take a number of the host as an argument of the kernel.
            if is_copy or tensor.dim():
                asked = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
                self._copied(tensor, tensor, to_host=False, waits=not (is_copy and asked))
        launched = [] if is_copy and on_host else kernels(func, args, kwargs, out)
        self._launched(launched, self._line())
        if key is not None and launched and all(isinstance(leaf, FakeTensor) or leaf is None for leaf in leaves(out)):
            self._known[key] = _Known(out, launched)
        return out

    def _launched(self, launched: Sequence[Kernel], line: Line) -> None:
        if torch.is_grad_enabled():
            self._lines[torch._C._autograd._get_sequence_nr() - 1] = line
        self.launches += [Launch(kernel, line) for kernel in launched]

    def _to_host(self, out: Any, given: Sequence[Tensor], waits: bool) -> Any:
        def real(leaf: object) -> object:
            if not (isinstance(leaf, FakeTensor) and leaf.device.type == "cpu"):
                return leaf
            tensor = torch.ones(leaf.shape, dtype=leaf.dtype)
            if not waits:  # torch pins what such a copy goes to.
                self._pinned[tensor.untyped_storage().data_ptr()] = tensor
            self._copied(tensor, given[0], to_host=True, waits=waits)
            return tensor

        return tree_map(real, out)

    def _copied(self, on_host: Tensor, tensor: Tensor, to_host: bool, waits: bool) -> None:
        line, pinned = self._line(), self.is_pinned(on_host)
        self.copies.append(Copy(to_host, tensor.numel() * tensor.element_size(), pinned, line))
        if waits:
            self.waits.append(Wait("copy to the host" if to_host else "copy from the host", line))

    def _line(self) -> Line:
        """The innermost one of ours; in the backward pass, that of the forward pass whose gradient is computed."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if (function := _function(code)) is not None:
                return Line(function, frame.f_lineno)
            if code.co_name == "_engine_run_backward":
                node = torch._C._current_autograd_node()
                line = None if node is None else self._lines.get(node._sequence_nr())
                if line is not None:
                    return line._replace(backward=True)
            frame = frame.f_back
        return Line("?", 0)


class _Known:
    """What an operator returned and launched, for the next call with equal arguments: it halves the time of a step."""

    def __init__(self, out: Any, launched: list[Kernel]) -> None:
        self.kernels = launched
        self._type = None if isinstance(out, Tensor) else list if isinstance(out, list) else tuple
        self._layouts = [
            None if t is None else (t.shape, t.stride(), t.dtype, t.fake_device)  # type: ignore[attr-defined]
            for t in leaves(out)
        ]

    def made(self, mode: FakeTensorMode) -> Any:
        """New fake tensors like those returned."""
        made = [
            None
            if layout is None
            else FakeTensor(mode, torch.empty_strided(*layout[:2], dtype=layout[2], device="meta"), layout[3])
            for layout in self._layouts
        ]
        return made[0] if self._type is None else self._type(made)


def _key_of(func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
    """Equal for calls that return and launch the same: of new tensors, from a few on the GPU; else None."""
    if len(given) > 8 or not _returns_new(func) or not all(isinstance(t, FakeTensor) for t in given):
        return None
    storages = [t.untyped_storage()._cdata for t in given]
    return func, _key(args), _key(kwargs), tuple(map(storages.index, storages))


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(each)) for name, each in value.items())
    # 1, 1.0 and True are equal; numbers that a generator draws do not matter.
    return type(value), None if isinstance(value, _REAL_GENERATOR) else value


@cache
def _returns_new(func: torch._ops.OpOverload) -> bool:
    schema = func._schema
    return not func.is_view and all(a.alias_info is None for a in (*schema.arguments, *schema.returns))


@cache
def _function(code: CodeType) -> str | None:
    """File and name of a function of ours; None for others."""
    ours = code.co_filename.startswith(_OURS) and code.co_filename not in _ONLOOKERS
    return f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname}" if ours else None


def _is_on_gpu(leaf: object) -> bool:
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


def _check(func: Any, args: Sequence[Any], generator: torch.Generator | None, known: Mapping[int, object]) -> None:
    """Raise as a GPU would where FakeTensorMode does not."""
    if generator is not None and generator._cdata not in known:  # type: ignore[attr-defined]
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if func is aten.index.Tensor and args[0].device.type == "cpu":
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


def _in_layout(out: Any, given: Sequence[Tensor]) -> Any:
    """Results of a convolution as cuDNN lays them out, which fake tensors ask only where a GPU is there."""
    if not any(suggest_memory_format(t) == torch.channels_last for t in given if t.dim() == 4):
        return out

    def laid_out(leaf: object) -> object:
        is_map = isinstance(leaf, Tensor) and leaf.dim() == 4
        return leaf.contiguous(memory_format=torch.channels_last) if is_map else leaf  # type: ignore[attr-defined]

    return tree_map(laid_out, out)


_REAL_GENERATOR = torch.Generator


class _Queue:
    """A stream, or an event of one: whoever waits for it on the host is noted, all else does nothing."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.device, self.cuda_stream, self.stream_id = torch.device("cuda:0"), 0, 0
        self.device_index, self.device_type = 0, 1

    def synchronize(self) -> None:
        self._gpu.wait("synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Queue) -> float:
        return 1.0

    def record(self, *_: object) -> None: ...

    wait = wait_event = wait_stream = record_event = record

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Graph:
    """A CUDA graph: what is launched while it is captured, which a replay launches again."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._launches: list[Launch] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Within it, nothing is launched, and what no graph can hold is refused."""
        gpu = self._gpu
        waits, copies, start = len(gpu.waits), len(gpu.copies), len(gpu.launches)
        yield
        # From pinned memory a graph can copy, but always from the same.
        forbidden = [*gpu.waits[waits:], *gpu.copies[copies:]]
        if forbidden:
            raise RuntimeError(f"operation not permitted when stream is capturing: {forbidden[0]}")
        self._launches = [launch._replace(graphed=True) for launch in gpu.launches[start:]]
        del gpu.launches[start:]

    def replay(self) -> None:
        """All of it as one launch."""
        self._gpu.replays += 1
        self._gpu.launches += self._launches


class _Properties:
    """What torch asks of a device: those of an H200."""

    name, major, minor, total_memory, multi_processor_count = "fake H200", 9, 0, 141 * 10**9, 132
    warp_size, max_threads_per_multi_processor, regs_per_multiprocessor = 32, 2048, 65536
    L2_cache_size, shared_memory_per_block_optin, gcnArchName = 60 * 2**20, 232448, ""  # noqa: N815


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as an H200 chooses: bf16 goes to flash attention, fp32 to "efficient"."""
    if query.device.type != "cuda":
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return _REAL_ATTEND(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(low), key.to(low), value.to(low)
    with torch.autocast("cuda", enabled=False):
        if query.dtype in (torch.bfloat16, torch.float16):
            channels = query.shape[-1]
            if missing := -channels % 8:
                query, key, value = (torch.nn.functional.pad(t, (0, missing)) for t in (query, key, value))
            flash = aten._scaled_dot_product_flash_attention
            found: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale or channels**-0.5)[0]
            return found[..., :channels]
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, gradients, dropout_p, is_causal, scale=scale)[0]


_REAL_ATTEND = torch.nn.functional.scaled_dot_product_attention


def _swap_or_set(ours: Tensor, other: Tensor) -> None:
    """torch.utils.swap_tensors; a fake parameter, which weak references keep from being swapped, takes other data."""
    if isinstance(ours, FakeTensor) and isinstance(other, FakeTensor):
        ours.data = other
    else:
        _REAL_SWAP(ours, other)


_REAL_SWAP = torch.utils.swap_tensors


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Within it, one GPU is there that computes nothing; afterwards the process is as before.

    Raises:
        RuntimeError: torch was built without CUDA, or a GPU is there.
    """
    if torch.version.cuda is None:
        raise RuntimeError("fake_gpu: found a torch built without CUDA, expected one with it.")
    if torch.cuda.is_available():
        raise RuntimeError("fake_gpu: found a GPU, expected none; set CUDA_VISIBLE_DEVICES to nothing.")
    gpu = FakeGpu()

    def nothing(*_: object, **__: object) -> None: ...

    def queue(*_: object, **__: object) -> _Queue:
        return _Queue(gpu)

    of_cuda: dict[str, Any] = {
        **dict.fromkeys(("_lazy_init", "init", "empty_cache", "reset_peak_memory_stats", "set_device"), nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state", "set_stream", "ipc_collect"), nothing),
        **dict.fromkeys(("Stream", "Event", "current_stream", "default_stream", "stream", "device"), queue),
        **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "mem_get_info": lambda *_: (140 * 10**9, 141 * 10**9),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 2**30),
        "max_memory_reserved": lambda *_: 2**30,
        "get_device_properties": lambda *_: _Properties(),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "fake H200",
        "CUDAGraph": lambda: _Graph(gpu),
        "graph": lambda graph, **_: graph.capture(),
        "graph_pool_handle": lambda: (0, 1),
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in of_cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch, "Generator", gpu.generator))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda t, *_: gpu.pin(t)))
        stack.enter_context(mock.patch.object(Tensor, "is_pinned", lambda t, *_: gpu.is_pinned(t)))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", nothing))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attend))
        # Fake tensors as torch's own: lists of them go through one kernel, and modules convert them in place.
        for module in map(importlib.import_module, ("torch.utils._foreach_utils", "torch.optim.optimizer")):
            known = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", known))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap_or_set))
        # Fake tensors would start CUDA.
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", nothing))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda _: True)))
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(_no_context())
        # torch.tensor(.., device="cuda") makes a CPU tensor and copies it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # Of deepcopy, and of no consequence.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(gpu)
        yield gpu


@contextlib.contextmanager
def _no_context() -> Iterator[None]:
    """Within it, torch's hooks of CUDA say that no GPU has a context.

    The autograd engine asks them, and they raise where there is no GPU. The one object that answers gets a copy of its
    table of virtual functions, in which ``hasPrimaryContext`` says no.
    """
    folder, word = Path(torch.__file__).parent, ctypes.sizeof(ctypes.c_void_p)
    header = (folder / "include/ATen/detail/AcceleratorHooksInterface.h").read_text()
    virtual = re.findall(r"^\s*virtual\s+[^;{]*?(~?\w+)\s*\(", header, re.MULTILINE)
    # A destructor has two entries; before the first function are the offset and the type.
    place = 2 + virtual.index("hasPrimaryContext") + sum(name.startswith("~") for name in virtual)
    hooks = ctypes.CDLL(str(folder / "lib/libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    table = ctypes.cast(hooks(), ctypes.POINTER(ctypes.c_void_p))
    before = table[0]
    assert before is not None
    # More entries than it has: what follows is not used.
    size = 2 * len(virtual) + 40
    copy = (ctypes.c_void_p * size).from_buffer_copy(ctypes.string_at(before - 2 * word, size * word))
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, device: False)
    copy[place] = ctypes.cast(answer, ctypes.c_void_p).value
    table[0] = ctypes.addressof(copy) + 2 * word
    try:
        yield
    finally:
        table[0] = before
