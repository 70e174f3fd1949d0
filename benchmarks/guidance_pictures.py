"""What guidance does, and what a model draws from an image that is given, as one picture for the docs.

    python -m benchmarks.guidance_pictures --weights weights.safetensors --data /tmp/study/digits/store \\
        --out docs/pictures/guidance.png

The weights are of a class-conditional network that was trained with label dropout, such as those of
benchmarks/guidance_digits.yaml; the image is one of its data set.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dvdp.data.store import ImageStore
from dvdp.evaluation.figures import contact_sheet, save_png
from dvdp.models.export import load_model
from dvdp.models.given import given

COLUMNS = 8


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="its LMDB store")
    parser.add_argument("--image", type=int, default=3, help="number of the one that is given")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = load_model(options.weights)
    pixels, _ = ImageStore(options.data)[options.image]
    whole, side = pixels.transpose(1, 2, 0), model.resolution
    hole = np.zeros((side, side), dtype=np.uint8)
    hole[side // 2 :] = 255
    small = whole.reshape(side // 4, 4, side // 4, 4, 3).mean((1, 3)).round().astype(np.uint8)
    rows: dict[str, Tensor] = {
        f"guidance {scale:g}": model.sample(COLUMNS, seed=0, guidance=scale) for scale in (0.0, 1.0, 3.0)
    }
    given_ = {
        "lower half drawn anew": {"image": png(whole), "mask": png(hole)},
        "upscaled by 4": {"image": png(small), "upscale": 4},
        "strength 0.3": {"image": png(whole), "strength": 0.3},
        "strength 0.6": {"image": png(whole), "strength": 0.6},
    }
    seen = {
        "lower half drawn anew": np.where(hole[..., None] > 0, np.uint8(128), whole),
        "upscaled by 4": small.repeat(4, axis=0).repeat(4, axis=1),
    }
    for name, request in given_.items():
        drawn = model.sample(COLUMNS - 1, seed=0, given=given(side, **request))  # type: ignore[arg-type]
        first = torch.from_numpy(np.ascontiguousarray(seen.get(name, whole).transpose(2, 0, 1)))
        rows[name] = torch.cat([first[None], drawn])
    print(save_png(contact_sheet(rows, columns=COLUMNS, scale=2), options.out))


def png(image: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) or (H, W) as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
