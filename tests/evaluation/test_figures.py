"""Pictures show what they say, whole, and drag in nothing that is not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from dvdp import Process, Schedule
from dvdp.diffusion import bands
from dvdp.evaluation.figures import (
    ACCENT,
    GUTTER,
    LARGEST,
    contact_sheet,
    curves,
    diffused_states,
    generated_states,
    grid,
    picture_times,
    process_picture,
    save_png,
)
from tests.evaluation.support import Arrays


def edges_are_white(picture: Image.Image, width: int = 8) -> bool:
    pixels = np.asarray(picture)
    resolutions = (pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:])
    return all((resolution == 255).all() for resolution in resolutions)


def boxes(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """Columns that hold a pixel of this colour, counted by contiguous stretch, in the lower half."""
    pixels = np.asarray(picture)[picture.height // 2 :]
    columns = (pixels == np.array(colour)).all(axis=2).any(axis=0).astype(int)
    return int((np.diff(columns, prepend=0) == 1).sum())


def test_grid_enlarges_pixels_and_separates_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    sheet = np.asarray(grid(images, columns=3, scale=4))
    assert sheet.shape == (2 * (32 + GUTTER) + GUTTER, 3 * (32 + GUTTER) + GUTTER, 3)
    assert (sheet[:GUTTER] == 255).all()
    tile = sheet[GUTTER + 32 + GUTTER :, GUTTER + 32 + GUTTER :][:32, :32]
    assert np.array_equal(tile[::4, ::4], images[4].transpose(1, 2, 0))
    assert np.array_equal(tile[3::4, 3::4], images[4].transpose(1, 2, 0))


def test_float_and_uint8_images_look_the_same() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    as_float = images.float() / 127.5 - 1
    pictures = [grid(x, 2) for x in (images, images.numpy(), as_float, as_float.double().numpy())]
    assert all(picture.tobytes() == pictures[0].tobytes() for picture in pictures)
    assert grid(torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4), 2, 1).getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize(("resolution", "shown"), [(8, 96), (16, 96), (32, 96), (64, 128), (256, 256)])
def test_small_images_become_legible_and_large_ones_stay(resolution: int, shown: int) -> None:
    assert grid(np.zeros((1, 3, resolution, resolution), np.uint8)).width == shown + 2 * GUTTER


def test_contact_sheet_shows_every_setting_whole() -> None:
    colours = {"ddpm": (200, 0, 0), "dvdp-300-600-with-a-rather-long-name": (0, 200, 0), "dvdp-600": (0, 0, 200)}
    settings = {
        name: np.tile(np.array(colour, np.uint8).reshape(1, 3, 1, 1), (9, 1, 32, 32))
        for name, colour in colours.items()
    }
    sheet = contact_sheet(settings, "A title that is longer than everything else on this sheet" * 3, columns=5)
    assert edges_are_white(sheet)
    places = [np.argwhere((np.asarray(sheet) == colour).all(axis=2)) for colour in colours.values()]
    assert [len(place) for place in places] == [5 * 96 * 96] * 3
    assert len({place[:, 1].min() for place in places}) == 1
    assert places[0][:, 0].max() < places[1][:, 0].min() < places[2][:, 0].min()


@pytest.mark.parametrize("turning_points", [(), (600,), (300, 600), (5, 10, 990)])
def test_picture_times_reach_every_level_and_both_ends(turning_points: tuple[int, ...]) -> None:
    process = Process(Schedule.dvdp(turning_points))
    times = picture_times(process)
    assert (times[0], times[-1]) == (0, 1000)
    assert {process.level(t) for t in times} == set(range(len(turning_points) + 1))
    assert len(times) < 15


@pytest.fixture(scope="module")
def clean(digits: Arrays) -> Tensor:
    return torch.from_numpy(digits.pixels[3]).float() / 127.5 - 1


def knows(process: Process, clean: Tensor) -> object:
    """The denoiser that knows the one image there is."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        level = process.level(t)
        return process.predict_noise(x, t, bands.to_level(clean[None], level).expand_as(x), level)

    return denoiser


def test_states_are_those_of_the_process(clean: Tensor) -> None:
    process = Process(Schedule.dvdp((300, 600)))
    times = picture_times(process)
    diffused = diffused_states(process, clean, times)
    assert [state.t for state in diffused] == times
    assert torch.equal(diffused[0].x, clean)
    generated = generated_states(process, knows(process, clean), (3, 32, 32), times, steps=100)  # type: ignore[arg-type]
    assert torch.allclose(generated[0].x, clean, atol=1e-4)
    for a, b in zip(diffused, generated, strict=True):
        assert a.x.shape == b.x.shape == (3, 32 >> a.level, 32 >> a.level)
        assert abs(a.t - b.t) <= 20


@pytest.mark.parametrize("turning_points", [(), (600,), (300, 600), (100, 120, 900)])
@pytest.mark.parametrize("title", ["", "One image, diffused and generated"])
def test_process_picture_marks_the_turning_points_and_clips_nothing(
    clean: Tensor, turning_points: tuple[int, ...], title: str
) -> None:
    process = Process(Schedule.dvdp(turning_points))
    states = diffused_states(process, clean, picture_times(process))
    picture = process_picture(process, states, states, title)
    assert edges_are_white(picture)
    assert boxes(picture, ImageColor.getrgb(ACCENT)) == len(turning_points)


def test_process_picture_draws_states_on_one_scale(clean: Tensor) -> None:
    process = Process(Schedule.dvdp((300, 600)))
    black = [state._replace(x=torch.full_like(state.x, -9)) for state in diffused_states(process, clean, [0, 400, 900])]
    pixels = np.asarray(process_picture(process, black, black))
    runs = {int((row == 0).all(axis=1).sum()) for row in pixels}
    assert runs == {0, 160, 160 + 80, 160 + 80 + 40}


def test_process_picture_reduces_large_images() -> None:
    process = Process(Schedule.dvdp((500,)))
    states = diffused_states(process, torch.full((3, 512, 512), -1.0), [0])
    pixels = np.asarray(process_picture(process, states, states))
    assert max(int((row == 0).all(axis=1).sum()) for row in pixels) == LARGEST


def test_curves_repeat_and_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    points = [(i * 1000, 1 / (i + 1)) for i in range(20)]
    broken = [*points, (5500, float("nan")), (float("inf"), 1.0)]
    paths = [
        curves(tmp_path / f"{name}.png", {"a": line, "empty": []}, "Loss", "images", "loss", logy=True)
        for name, line in (("a", points), ("b", broken), ("c", [*points, (500, -1.0)]))
    ]
    assert len({path.read_bytes() for path in paths}) == 1
    with Image.open(paths[0]) as picture:
        assert picture.size == (960, 540)
        assert edges_are_white(picture.convert("RGB"), 2)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("count", [12, 51])
def test_many_curves_are_distinct_and_whole(tmp_path: Path, count: int) -> None:
    lines = {f"setting-{i} with a long name": [(0.0, i), (1.0, i + 1)] for i in range(count)}
    with Image.open(curves(tmp_path / "many.png", lines, "Many", "x", "y")) as picture:
        assert edges_are_white(picture.convert("RGB"), 2)


def test_saved_pictures_are_whole(tmp_path: Path) -> None:
    picture = grid(np.zeros((2, 3, 4, 4), np.uint8))
    with Image.open(save_png(picture, tmp_path / "deep" / "grid.png")) as again:
        assert again.tobytes() == picture.tobytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_evaluation_imports_nothing_optional_and_no_pyplot(tmp_path: Path) -> None:
    program = f"""
import sys
import dvdp.evaluation.extractors, dvdp.evaluation.scores, dvdp.evaluation.figures as figures
optional = {{"torch_fidelity", "torchvision", "matplotlib", "lmdb", "albumentations", "sklearn"}}
assert not optional & sys.modules.keys(), optional & sys.modules.keys()
from pathlib import Path
figures.curves(Path({str(tmp_path)!r}) / "a.png", {{"a": [(0, 1), (1, 2)]}}, "t", "x", "y")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


ODD = ["$x$", "$\\frac{$", "_hidden", "a\nb", "x" * 5000, "<b>", os.fsdecode(b"caf\xe9")]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_names_in_figures_are_drawn_as_they_are_written(tmp_path: Path, name: str) -> None:
    title = name[:50]
    sheet = contact_sheet({name: np.zeros((1, 3, 8, 8), np.uint8)}, title)
    assert edges_are_white(sheet)
    assert sheet.width < 3000
    path = curves(tmp_path / "odd.png", {name: [(1.0, 1.0), (2.0, 2.0)], "plain": []}, title, title, title)
    with Image.open(path) as picture:
        assert picture.width < 3000


def test_lines_whose_name_begins_with_an_underscore_are_in_the_legend(tmp_path: Path) -> None:
    pictures = []
    for name in ("_", ""):
        with Image.open(curves(tmp_path / "x.png", {name: [(1.0, 1.0)]}, "", "", "")) as picture:
            pictures.append(np.asarray(picture))
    assert (pictures[0] != pictures[1]).any()
