"""Memory that runs out, of a GPU or of the process: told from other errors, and met with fewer images at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import logging
import re
import resource
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from dvdp import hardware
from dvdp.errors import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("dvdp.memory")

#: What says so in a text: of CUDA (its allocator, cuBLAS, cuDNN, NCCL), and of the allocators of a CPU and of oneDNN,
#: which has no memory for its code then.
_SIGNS = re.compile(
    r"can't allocate memory|Cannot allocate memory|std::bad_alloc|could not create a primitive$|CUDA out of memory"
    r"|CUDA error: out of memory|Cuda failure.*out of memory|CU(?:BLAS|DNN|SOLVER|FFT|SPARSE)_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_\w*ALLOCATION_FAILED"
)

T = TypeVar("T")


class OutOfMemory(UserError):  # noqa: N818
    """Memory ran out, of a GPU or of the machine; the sentence says where, what there was, and what to change."""

    def __init__(self, sentence: str, gpu: bool = False) -> None:
        super().__init__(sentence)
        self.gpu = gpu


def ran_out(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, is for want of memory."""
    while error is not None:
        if isinstance(error, OutOfMemory | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        # torch's, by name: importing torch takes seconds.
        if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__) or _SIGNS.search(str(error)):
            return True
        error = error.__cause__
    return False


def release() -> None:
    """Give back what is held of freed tensors. No exception whose frames hold some may be handled meanwhile."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # Of glibc alone.
        ctypes.CDLL(None).malloc_trim(0)


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU, or of what this process may use of the machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)
    return hardware.free_memory(), hardware.memory()


def there(free: int, total: int, gpu: bool) -> str:
    """A clause on the memory that there is."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    bound = "" if gpu or limit == resource.RLIM_INFINITY else f", and the process may address {limit / 2**30:.2f} GiB"
    return f"{'the GPU' if gpu else 'the machine'} has {free / 2**30:.2f} of {total / 2**30:.2f} GiB free{bound}"


def in_batches(
    work: Callable[[int, int], T], first: int, end: int, batch: int, device: torch.device, what: str
) -> Iterator[tuple[int, T]]:
    """``work(start, count)`` for all of ``first`` .. ``end`` - 1, by ``batch``, with the start of each.

    Where memory runs out, batches are half as large from there on, which a line of the log says: nothing that is
    computed may depend on how it is divided.

    Args:
        what: names the work and its batch, such as "sampling.batch".

    Raises:
        OutOfMemory: not even one at a time fits.
    """
    size, start = batch, first
    while start < end:
        count = min(size, end - start)
        try:
            done = work(start, count)
        except Exception as error:
            if not ran_out(error):
                raise
            told = there(*free_and_total(device), device.type == "cuda")
            if count == 1:
                raise OutOfMemory(
                    f"{what}: memory ran out with one image at a time, {batch} were asked for; {told}; use a smaller"
                    " network or a device with more memory.",
                    device.type == "cuda",
                ) from error
            smaller = -(-count // 2)
        else:
            yield start, done
            start += count
            continue
        # The exception is gone, and with it the frames that held the batch.
        release()
        logger.warning(
            "%s: memory ran out with %d images at a time; %s; it goes on with %d at a time", what, count, told, smaller
        )
        size = smaller
