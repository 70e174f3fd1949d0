"""Images a second and core of the training stream, beside torchvision's ImageFolder over the same images.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        taskset -c 1 python -m benchmarks.loading --out benchmarks/results/loading.json

Ours reads a store of each encoding; ImageFolder, in a DataLoader, reads a folder of the very same encoded images, and
one of originals of 500 px that it has to resize. All mirror at random and give uint8. They take turns in one process,
each with and without a loader worker; a rate is a median of images per second of processor time, of loader and reader
together, and of wall-clock time. Everything lies in the page cache.

Images: the flowers in the folder that DVDP_TEST_DATA names, if it holds them; else synthetic ones, of noise at every
scale. The 500 px are those enlarged, quality 95 with half the colour resolution: lighter than real ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, Resize
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.timing import in_turns, spreads
from dvdp.data.loading import training_batches
from dvdp.data.records import Encoding, Form, encode
from dvdp.data.sources import SOURCES
from dvdp.data.store import ImageStore
from dvdp.data.transforms import prepare_transform
from dvdp.data.writer import StoreWriter
from dvdp.files import write_atomically

SIDE, ORIGINAL, QUALITY = 256, 500, 95
WORKERS = (0, 1)
#: Images a second that one H200 can take; see docs/data.md.
NEED = 400


class Way(NamedTuple):
    """Of loading images."""

    name: str
    place: Path
    batches: Callable[..., Iterator[Any]]
    """Endless; of ``batch`` images, read by ``workers``."""


def main() -> None:
    """Make the folders, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="of images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flowers = Path(os.environ.get("DVDP_TEST_DATA", ""), "flowers256-part1.tar")
    pictures = photographs(flowers, options.count) if flowers.is_file() else synthetic(options.count)
    with tempfile.TemporaryDirectory() as scratch:
        ways = write(pictures, Path(scratch))
        keys = [(way, workers) for way in ways for workers in WORKERS]
        works = [partial(rates, way, workers, options.batch, options.seconds) for way, workers in keys]
        found = dict(zip(keys, zip(*in_turns(works, options.turns, "loading"), strict=True), strict=True))

        def rows(turns: slice) -> list[dict[str, Any]]:
            return [row(way, len(pictures), [found[way, workers][turns] for workers in WORKERS]) for way in ways]

        every, single = rows(slice(None)), [rows(slice(i, i + 1)) for i in range(options.turns)]
    result = {
        "machine": {**machine(), "torchvision": torchvision.__version__, "pillow": PIL.__version__},
        "images": flowers.name if flowers.is_file() else "synthetic",
        "count": len(pictures),
        "resolution": SIDE,
        "jpeg_quality": QUALITY,
        "batch": options.batch,
        "page_cache": "warm",
        "turns": options.turns,
        "need_images_per_second": NEED,
        "ways": every,
        "ratios": ratios(every),
        "spreads": spreads([ratios(turn) for turn in single]),
    }
    if options.out:
        write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    print(table(result))


def photographs(archive: Path, count: int) -> list[NDArray[np.uint8]]:
    """The first images of an archive, as `dvdp prepare` makes them: (3, side, side)."""
    transform = prepare_transform(SIDE)
    return [transform(item.load()) for item in islice(SOURCES["image_folder"](archive), count)]


def synthetic(count: int) -> list[NDArray[np.uint8]]:
    """Sums of noise at every scale, the coarser the stronger, as in photographs."""
    source = torch.Generator().manual_seed(0)
    resolutions = [SIDE >> k for k in range(7)]

    def picture() -> NDArray[np.uint8]:
        layers = [
            interpolate(torch.randn(1, 3, resolution, resolution, generator=source), SIDE, mode="bilinear")
            * (8 * SIDE / resolution) ** 0.7
            for resolution in resolutions
        ]
        return (128 + torch.cat(layers).sum(0)).clamp(0, 255).byte().numpy()

    return [picture() for _ in range(count)]


def write(pictures: Sequence[NDArray[np.uint8]], root: Path) -> list[Way]:
    """A store and, but for raw, two folders of each encoding; all are in the page cache then."""
    ways = []
    encodings: tuple[Encoding, ...] = ("raw", "png", "jpeg")
    for encoding in encodings:
        form = Form(SIDE, encoding, QUALITY if encoding == "jpeg" else None)
        store, small, large = (root / f"{encoding}-{kind}" for kind in ("store", SIDE, ORIGINAL))
        for folder in (small, large):
            (folder / "all").mkdir(parents=True)
        with StoreWriter(store, name="pictures", source="image_folder", form=form) as writer:
            for i, picture in enumerate(tqdm(pictures, desc=f"write {encoding}", leave=False, disable=None)):
                records = encode([picture], [-1], form)
                writer.add(records)
                writer.checkpoint()
                if encoding == "raw":
                    continue
                name = f"all/{i:05d}.{encoding}"
                # What comes after the label is the file.
                (small / name).write_bytes(records.values[0][4:])
                original = Image.fromarray(picture.transpose(1, 2, 0)).resize((ORIGINAL, ORIGINAL))
                original.save(large / name, quality=QUALITY)
            writer.finish()
        ours = partial(training_batches, ImageStore(store), seed=0, flip=True)
        ways.append(Way(f"ours, {encoding}", store, ours))
        if encoding != "raw":
            ways.append(Way(f"ImageFolder, {encoding}, {SIDE} px", small, partial(image_folder, small)))
            ways.append(Way(f"ImageFolder, {encoding}, {ORIGINAL} px", large, partial(image_folder, large)))
    for file in files(root):
        file.read_bytes()
    return ways


def image_folder(place: Path, *, batch: int, workers: int) -> Iterator[Any]:
    """Torchvision's way to infinite batches of mirrored uint8 images."""
    # Resize leaves an image of the right size alone.
    folder = ImageFolder(str(place), Compose([Resize(SIDE), RandomHorizontalFlip(), PILToTensor()]))
    # So many images that its epochs never end, each in an order of its own.
    sampler = RandomSampler(folder, num_samples=sys.maxsize)
    return iter(DataLoader(folder, batch, sampler=sampler, num_workers=workers))


def rates(way: Way, workers: int, batch: int, at_least: float) -> tuple[float, float]:
    """Images per second of processor time of all processes, and of wall-clock time, over so many seconds."""
    batches = way.batches(batch=batch, workers=workers)
    # Once the first batch is here, everything has started.
    next(batches)
    processes = [child.pid for child in multiprocessing.active_children() if child.pid]
    count, wall, cpu = 0, time.perf_counter(), processor_seconds(processes)
    while not count or time.perf_counter() - wall < at_least:
        next(batches)
        count += batch
    return count / (processor_seconds(processes) - cpu), count / (time.perf_counter() - wall)


def processor_seconds(others: Sequence[int]) -> float:
    """Of this process and others, to 10 ms."""
    # After the name, which may hold spaces, fields 14 and 15 of proc_pid_stat(5).
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in others]
    return time.process_time() + sum(int(row[11]) + int(row[12]) for row in fields) / os.sysconf("SC_CLK_TCK")


def row(way: Way, count: int, found: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Of the result: what the turns of each number of workers found."""
    per_core = [median(core for core, _ in turns) for turns in found]
    return {
        "name": way.name,
        "bytes_per_image": sum(file.stat().st_size for file in files(way.place)) / count,
        "workers": WORKERS,
        "images_per_second_and_core": per_core,
        "lowest_and_highest_turn": [(min(turns)[0], max(turns)[0]) for turns in found],
        "images_per_second": [median(wall for _, wall in turns) for turns in found],
        "cores_for_the_need": NEED / per_core[-1],
    }


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of ours over each of ImageFolder's images per second and core, for each number of workers."""
    ours, theirs = ([row for row in rows if row["name"].startswith("ours") == mine] for mine in (True, False))
    key = "images_per_second_and_core"
    return {
        f"{mine['name']} over {other['name']}, {workers} workers": mine[key][i] / other[key][i]
        for mine in ours
        for other in theirs
        for i, workers in enumerate(WORKERS)
    }


def table(result: dict[str, Any]) -> str:
    """Markdown, for docs/data.md."""
    lines = [
        f"| | KB an image | images a second and core, no worker | one worker | cores for {NEED} images/s, so |",
        "|---|---|---|---|---|",
    ]
    for row in result["ways"]:
        each = " | ".join(f"{rate:,.0f}" for rate in row["images_per_second_and_core"])
        lines.append(
            f"| {row['name']} | {row['bytes_per_image'] / 1e3:.0f} | {each} | {row['cores_for_the_need']:.2f} |"
        )
    return "\n".join(lines)


def files(place: Path) -> list[Path]:
    """All that are in a folder and below."""
    return [path for path in place.rglob("*") if path.is_file()]


if __name__ == "__main__":
    main()
