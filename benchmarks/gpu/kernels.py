"""What an operator of torch does on a GPU in eager mode: its kernels, the bytes each reads and writes, its FLOPs.

By default an operator is one kernel that reads each tensor given and writes each tensor returned once. :data:`PASSES`
says what is otherwise, from torch's sources and from profiles of cuDNN; an operator of our own that is more than one
kernel, or reads a tensor twice, is one more function there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

#: They launch nothing, beside the operators that torch itself calls views.
NOTHING = {
    "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_",
    "resize_", "_reshape_alias", "_unsafe_view", "record_stream", "device", "is_pinned",
}  # fmt: skip
#: They write their first argument and do not read it.
OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_"}
#: torch's multi_tensor_apply: tensors a launch takes by the number of its lists, blocks a launch, elements a block.
TENSORS_OF_A_LAUNCH, BLOCKS_OF_A_LAUNCH, ELEMENTS_OF_A_BLOCK = (110, 64, 48, 36, 30), 320, 65536


class Kernel(NamedTuple):
    """One launch, or several of equal kernels together."""

    operator: str
    read: int
    """Bytes."""
    written: int
    """Bytes."""
    flops: int
    """Of matrix products and convolutions; a multiply-add is two."""
    dtype: torch.dtype
    """That it computes in, by its largest tensor of floating point."""
    launches: int = 1


@dataclass(frozen=True)
class Call:
    """An operator with what it was given and what it returned."""

    name: str
    """Without the namespace of torch's own operators and without the overload."""
    arguments: Mapping[str, Any]
    """By the names of the schema; those with defaults may be missing."""
    mutated: frozenset[str]
    """Arguments that it writes."""
    made: Sequence[Tensor]
    flops: int

    def tensor(self, name: str) -> Tensor:
        """An argument that is a tensor."""
        found = self.arguments[name]
        assert isinstance(found, Tensor), name
        return found

    def tensors(self, *names: str) -> list[Tensor]:
        """All tensors on the GPU in some arguments; in all of them by default."""
        found = leaves([self.arguments.get(name) for name in names or self.arguments])
        return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]

    def kernel(
        self,
        operator: str,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
        flops: int = 0,
        launches: int = 1,
    ) -> Kernel:
        """A kernel that touches some tensors, each once."""
        floats = [t for t in (*reads, *writes) if t.dtype.is_floating_point] or [*writes, *reads]
        dtype = max(floats, key=lambda t: t.numel()).dtype if floats else torch.float32
        return Kernel(operator, total_bytes(reads), total_bytes(writes), flops, dtype, launches)


def leaves(value: object) -> list[object]:
    """What lists, tuples and dictionaries hold, as torch.utils._pytree has it, in less time."""
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in leaves(each)]
    return leaves(list(value.values())) if isinstance(value, dict) else [value]


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Of different tensors, without what an expanded one repeats."""
    unique = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in tensors}
    return sum(
        t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
        for t in unique.values()
    )


def kernels(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: object) -> list[Kernel]:
    """What an operator launches, in order."""
    name, names, mutated = _schema(func)
    if func.is_view or name in NOTHING or name.startswith(("prim::", "sym_")):
        return []
    made = [leaf for leaf in leaves(out) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]
    arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
    flops = 0
    if (count := flop_registry.get(func._overloadpacket)) is not None:
        flops = count(*args, **kwargs, out_val=out)
    call = Call(name, arguments, mutated, made, flops)
    if not any(t.numel() for t in (*made, *call.tensors())):
        return []
    if name in PASSES:
        return PASSES[name](call)
    if name.startswith("_foreach_"):
        return _foreach(call)
    written = call.tensors(*mutated) if mutated else []
    ignored = {"self"} if name in OVERWRITING else {"out"}
    read = call.tensors(*(key for key in arguments if key not in ignored)) if arguments.keys() - ignored else []
    return [call.kernel(name, read, [*written, *made], flops)]


@cache
def _schema(func: torch._ops.OpOverload) -> tuple[str, list[str], frozenset[str]]:
    """Name, arguments, and which of these it writes."""
    arguments = func._schema.arguments
    mutated = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return func._schema.name.removeprefix("aten::"), [a.name for a in arguments], frozenset(mutated)


#: What an operator launches, by its name.
PASSES: dict[str, Callable[[Call], list[Kernel]]] = {}


def passes(*names: str) -> Callable[[Callable[[Call], list[Kernel]]], Callable[[Call], list[Kernel]]]:
    """Enter a function into :data:`PASSES`."""

    def enter(function: Callable[[Call], list[Kernel]]) -> Callable[[Call], list[Kernel]]:
        PASSES.update(dict.fromkeys(names, function))
        return function

    return enter


@passes("convolution")
def _convolution(call: Call) -> list[Kernel]:
    """cuDNN's, and in eager mode another pass over the output that adds the bias."""
    x, weight, (y,), bias = call.tensor("input"), call.tensor("weight"), call.made, call.arguments["bias"]
    found = [
        *_layout(call, x, weight),
        call.kernel("convolution", [x, weight], [y], call.flops),
        *_layout(call, y),
    ]
    if bias is not None:
        found.append(call.kernel("convolution, bias", [y, bias], [y]))
    return found


@passes("convolution_backward")
def _convolution_backward(call: Call) -> list[Kernel]:
    """A kernel for each gradient; that of the bias is a sum over the gradient of the output."""
    dy, x, weight = (call.tensor(name) for name in ("grad_output", "input", "weight"))
    of_input, of_weight, of_bias = call.arguments["output_mask"]
    made = iter(call.made)
    flops = call.flops // (int(of_input) + int(of_weight) or 1)
    found = _layout(call, dy)
    if of_input:
        dx = next(made)
        found += _layout(call, weight)
        found += [call.kernel("convolution, input gradient", [dy, weight], [dx], flops), *_layout(call, dx)]
    if of_weight:
        dw = next(made)
        found += _layout(call, x)
        found += [call.kernel("convolution, weight gradient", [x, dy], [dw], flops), *_layout(call, dw)]
    if of_bias:
        found.append(call.kernel("convolution, bias gradient", [dy], [next(made)]))
    return found


def _layout(call: Call, *tensors: Tensor) -> list[Kernel]:
    """Copies of those in torch's own layout.

    Tensor cores take channels last: torch copies what is not, or cuDNN does before its kernel and after it.
    """
    copied = [t for t in tensors if not t.is_contiguous(memory_format=torch.channels_last)]
    return [call.kernel("convolution, layout", [t], [t]) for t in copied]


@passes("native_group_norm")
def _group_norm(call: Call) -> list[Kernel]:
    """Statistics, their product with weight and bias for each channel of each image, and the application."""
    x, (y, mean, rstd) = call.tensor("input"), call.made
    affine = call.tensors("weight", "bias")
    found = [call.kernel("group norm, statistics", [x], [mean, rstd])]
    if affine:
        found.append(call.kernel("group norm, coefficients", [mean, rstd, *affine]))
    return [*found, call.kernel("group norm, apply", [x], [y])]


@passes("native_group_norm_backward")
def _group_norm_backward(call: Call) -> list[Kernel]:
    """Sums over x and dy, coefficients from them, dx from x and dy again; and the weights' gradients from the sums."""
    dy, x = call.tensor("grad_out"), call.tensor("input")
    of_input, *of_weights = call.arguments["output_mask"]
    made = list(call.made)
    found = [call.kernel("group norm backward, sums", [dy, x])]
    if of_input:
        found.append(call.kernel("group norm backward, coefficients", call.tensors("mean", "rstd", "weight")))
        found.append(call.kernel("group norm backward, input gradient", [dy, x], [made.pop(0)]))
    if any(of_weights):
        found.append(call.kernel("group norm backward, weight gradients", call.tensors("mean", "rstd"), made))
    return found


@passes("dvdp::group_norm_silu")
def _group_norm_silu(call: Call) -> list[Kernel]:
    """One kernel, which reads the images for their statistics and again for the result."""
    x, (y, mean, rstd) = call.tensor("x"), call.made
    return [call.kernel("group norm to SiLU", [x, x, *call.tensors("weight", "bias", "modulation")], [y, mean, rstd])]


@passes("dvdp::group_norm_silu_backward")
def _group_norm_silu_backward(call: Call) -> list[Kernel]:
    """One kernel, which reads images and gradients for their sums and again, and one for the weights' gradients."""
    dy, x, (dx, *of_weights) = call.tensor("dy"), call.tensor("x"), call.made
    affine, sums = call.tensors("weight", "bias", "modulation"), call.tensors("mean", "rstd")
    return [
        call.kernel("group norm to SiLU backward", [dy, x, dy, x, *affine, *sums], [dx, *sums]),
        call.kernel("group norm to SiLU backward, weights", [*sums, *affine], [t for t in of_weights if t.numel()]),
    ]


@passes("_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward")
def _attention_backward(call: Call) -> list[Kernel]:
    """Products of output and its gradient, the gradients, and that of the queries from its sums in fp32."""
    given = call.tensors("grad_out", "grad_out_", "query", "key", "value", "out", "logsumexp")
    out = call.tensors("grad_out", "grad_out_", "out")
    made = [t for t in call.made if t.numel()]
    dq = made[0]
    return [
        call.kernel("attention backward, products", out),
        call.kernel("attention backward", given, made, call.flops),
        call.kernel("attention backward, queries", [dq], [dq]),
    ]


@passes("embedding_dense_backward")
def _embedding_backward(call: Call) -> list[Kernel]:
    """Zeros, then a sum of up to 3,072 rows."""
    (made,) = call.made
    return [call.kernel("embedding backward, zeros", writes=[made]), call.kernel("embedding backward", call.tensors())]


@passes("select_backward", "slice_backward")
def _select_backward(call: Call) -> list[Kernel]:
    """Zeros of the whole, then a copy into a part."""
    grad, (made,) = call.tensor("grad_output"), call.made
    return [call.kernel(call.name, writes=[made]), call.kernel(call.name, [grad], [grad])]


@passes("_fused_adamw_", "_fused_adam_")
def _fused_adam(call: Call) -> list[Kernel]:
    """Reads weights, gradients and both moments, writes all but the gradients."""
    names = ("self", "exp_avgs", "exp_avg_sqs")
    launches = launches_of_lists([t.numel() for t in call.arguments["self"]], lists=4)
    read, written = call.tensors("grads", *names, "state_steps"), call.tensors(*names)
    return [call.kernel(call.name, read, written, launches=launches)]


def _foreach(call: Call) -> list[Kernel]:
    """In as few launches as lists of tensors fit into."""
    lists = [value for value in call.arguments.values() if isinstance(value, list | tuple) and _of_tensors(value)]
    results = 0 if call.mutated or call.name == "_foreach_norm" else 1
    launches = launches_of_lists([t.numel() for t in lists[0]], len(lists) + results)
    if call.name == "_foreach_norm":
        launches += 1  # From the sums of blocks.
    written = call.tensors(*call.mutated) if call.mutated else []
    ignored = {"self"} if call.name in ("_foreach_copy_", "_foreach_zero_") else set()
    read = call.tensors(*(name for name in call.arguments if name not in ignored)) if lists else []
    return [call.kernel(call.name, read, [*written, *call.made], launches=launches)]


def _of_tensors(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def launches_of_lists(sizes: Sequence[int], lists: int) -> int:
    """Launches of torch's multi_tensor_apply over lists of tensors of such numbers of elements."""
    most = TENSORS_OF_A_LAUNCH[min(lists, len(TENSORS_OF_A_LAUNCH)) - 1]
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        chunks = -(-size // ELEMENTS_OF_A_BLOCK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            last = chunk == chunks
            if blocks == BLOCKS_OF_A_LAUNCH or (last and tensors == most):
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)
