"""Generated images in files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dvdp.errors import UserError
from dvdp.files import write_atomically


def write_shard(path: Path, images: Tensor) -> None:
    """Write generated images, uint8 (n, 3, h, h), as a file of :class:`SampleShards`, atomically."""
    content = io.BytesIO()
    np.save(content, images.cpu().numpy())
    write_atomically(path, content.getvalue())


class SampleShards(Dataset):
    """Generated images in files ``<first image, 8 digits>.npy``, uint8 (n, 3, h, h), in image order.

    The files are mapped, not read: what is in memory is the images asked for.

    Args:
        shards: their folder, or the files.

    Raises:
        UserError: there are none, one is no such array, or they leave a gap or overlap.
    """

    def __init__(self, shards: Path | Sequence[Path]) -> None:
        paths = sorted(Path(shards).glob("*.npy")) if isinstance(shards, Path) else sorted(shards)
        if not paths:
            raise UserError(f"samples: found no .npy files in '{shards}', expected generated images; sample first.")
        self._arrays = [_open_shard(path) for path in paths]
        starts = np.cumsum([0, *(len(array) for array in self._arrays)])
        for path, start in zip(paths, starts, strict=False):
            if path.stem != f"{start:08d}":
                raise UserError(
                    f"samples: found '{path}' where image {start} should follow, expected a file"
                    f" '{start:08d}.npy'; sample the missing images again."
                )
        resolutions = {array.shape[-1] for array in self._arrays}
        if len(resolutions) > 1:
            raise UserError(
                f"samples: found resolutions {sorted(resolutions)} px in '{paths[0].parent}', expected one;"
                " remove the files of another run."
            )
        self._starts = starts
        self.resolution: int = resolutions.pop()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Tensor:
        """uint8 (3, h, h)."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return torch.from_numpy(np.array(self._arrays[shard][index - self._starts[shard]]))


def _open_shard(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"samples: found '{path}', which is no whole .npy file, expected one; sample again.") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3 or array.shape[2] != array.shape[3]:
        raise UserError(
            f"samples: found {array.dtype} {array.shape} in '{path}', expected uint8 (n, 3, h, h); sample again."
        )
    return array
