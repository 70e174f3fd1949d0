"""Pictures of images, of settings side by side, of the process, and of curves.

Images are uint8 (n, 3, h, w), or float in [-1, 1]. Pillow draws everything but curves, for which matplotlib is
imported when the first one is drawn.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dvdp.diffusion import bands
from dvdp.diffusion.process import Process
from dvdp.diffusion.randomness import generator
from dvdp.diffusion.sampling import Denoiser, Progress, sample
from dvdp.files import write_atomically
from dvdp.models.pixels import to_uint8
from dvdp.text import LABEL, printable, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which everybody can tell apart; for lines of a chart, in this order.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
#: Of text, of what is not the point, and of marks.
INK, SOFT, ACCENT, PAPER = "#222222", "#787878", "#b23a48", "#ffffff"
#: Between images, in pixels.
GUTTER = 2
#: Around pictures with text, in pixels.
MARGIN = 20
#: Small images are enlarged to about this many pixels.
LEGIBLE = 96
#: In the process picture full-size states are enlarged to about this many pixels, or reduced to at most LARGEST.
STATE, LARGEST = 160, 256


#: Of a curve: (x, y) each.
Points = Sequence[tuple[float, float]]


class State(NamedTuple):
    """One image on its way through the process."""

    t: int
    level: int
    x: Tensor
    """(C, h, w), in the pixel range of its level."""


def grid(images: np.ndarray | Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images in rows, with thin white gutters.

    Args:
        columns: about a square by default.
        scale: whole factor of enlargement, by nearest neighbour; by default small images become legible.
    """
    pixels = pixels_of(images)
    columns = columns or math.ceil(len(pixels) ** 0.5)
    tiles = [_enlarged(image, scale or _legible(pixels.shape[-1])) for image in pixels]
    width, height = tiles[0].size
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + GUTTER) + GUTTER, rows * (height + GUTTER) + GUTTER), PAPER)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet.paste(tile, (GUTTER + column * (width + GUTTER), GUTTER + row * (height + GUTTER)))
    return sheet


def contact_sheet(
    settings: Mapping[str, np.ndarray | Tensor], title: str = "", columns: int = 10, scale: int | None = None
) -> Image.Image:
    """Settings under each other, each with its name on the left and its first ``columns`` images on the right."""
    strips = {shown(name, LABEL): grid(images[:columns], columns, scale) for name, images in settings.items()}
    name_font, gap = _font(18), 10
    label_width = max(math.ceil(name_font.getlength(name)) for name in strips) + 16
    title_height = _heading_height(title)
    width = max(2 * MARGIN + label_width + max(strip.width for strip in strips.values()), _heading_width(title))
    height = title_height + 2 * MARGIN + sum(strip.height + gap for strip in strips.values()) - gap
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _heading(draw, title)
    y = MARGIN + title_height
    for name, strip in strips.items():
        draw.text((MARGIN, y + strip.height / 2), name, INK, name_font, anchor="lm")
        sheet.paste(strip, (MARGIN + label_width, y))
        y += strip.height + gap
    return sheet


def picture_times(process: Process, count: int = 9) -> list[int]:
    """About ``count`` timesteps for :func:`process_picture`: 0, T, and evenly inside every level, at least one each."""
    times = {0, process.schedule.timesteps}
    for level, share in enumerate(process.schedule.shares()):
        low, high = process.schedule.span(level)
        inside = max(1, round((count - 2) * share))
        times |= {low + round((high - low) * (i + 0.5) / inside) for i in range(inside)}
    return sorted(times)


def diffused_states(process: Process, image: Tensor, times: Sequence[int], seed: int = 0) -> list[State]:
    """A clean image (C, H, W) in [-1, 1] at several timesteps, all with the same noise."""
    noise = torch.randn(image.shape, generator=generator(seed, "picture"))
    states = []
    for t in sorted(times):
        level = process.level(t)
        x = process.diffuse(image[None], t, bands.to_level(noise[None], level))
        states.append(State(t, level, x[0]))
    return states


def generated_states(
    process: Process,
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    times: Sequence[int],
    **options: Any,
) -> list[State]:
    """One image (C, H, W) as it was at the steps of the sampler nearest to ``times``.

    Args:
        options: of :func:`dvdp.diffusion.sampling.sample`.
    """
    seen: list[State] = []

    def keep(progress: Progress) -> None:
        seen.append(State(progress.s, progress.level, progress.state[0].float().cpu()))

    sample(process, denoiser, (1, *shape), callback=keep, **options)
    nearest = {}
    for t in times:
        # Within the level of t: beside a turning point the nearest step may have another resolution.
        same = [state for state in seen if state.level == process.level(t)]
        nearest[t] = min(same, key=lambda state: abs(state.t - t))
    return [nearest[t] for t in sorted(times)]


def process_picture(
    process: Process, diffused: Sequence[State], generated: Sequence[State], title: str = ""
) -> Image.Image:
    """One image on its way to noise, and one on its way back, each state at its true size on a common scale.

    Args:
        diffused: the row above, as :func:`diffused_states` gives it.
        generated: the row below, column by column at about the times of the row above.
    """
    resolution = max(state.x.shape[-1] for state in diffused)
    small, label = _font(14), _font(16)
    rows = [("diffused", diffused), ("generated", generated)]
    tiles = [[_state_tile(state, resolution) for state in states] for _, states in rows]
    captions = [[(f"t = {state.t}", f"{state.x.shape[-1]} px") for state in states] for _, states in rows]
    # A column is as wide as what stands in it; at a turning point there is space for its mark.
    widths = [
        max(*(row[i].width for row in tiles), *(small.getlength(text) for row in captions for text in row[i]))
        for i in range(len(diffused))
    ]
    gap, mark_gap, head = 18, 44, 34
    label_width = max(math.ceil(label.getlength(name)) for name, _ in rows) + 44
    lefts, marks, x = [], [], float(MARGIN + label_width)
    for i, state in enumerate(diffused):
        if i:
            crossed = range(diffused[i - 1].level + 1, state.level + 1)
            x += mark_gap if crossed else gap
            marks += [(x - mark_gap / 2, level) for level in crossed]
        lefts.append(x)
        x += widths[i]
    row_height = max(tile.height for row in tiles for tile in row) + 50
    top = MARGIN + _heading_height(title) + head
    width = max(math.ceil(x) + MARGIN, _heading_width(title))
    sheet = Image.new("RGB", (width, top + 2 * row_height + MARGIN - 6), PAPER)
    draw = ImageDraw.Draw(sheet)
    _heading(draw, title)
    for x, level in marks:
        turning_point = process.schedule.turning_points[level - 1]
        draw.text((x, top - 12), f"T{level} = {turning_point}", ACCENT, small, anchor="mb")
        for y in range(top - 8, sheet.height - MARGIN, 8):
            draw.line((x, y, x, y + 3), ACCENT)
    for row, (name, _) in enumerate(rows):
        middle = top + row * row_height + (row_height - 50) / 2
        draw.text((MARGIN, middle - 14), name, INK, label, anchor="lm")
        _arrow(draw, MARGIN, middle + 10, 56, forward=row == 0)
        for left, column_width, tile, caption in zip(lefts, widths, tiles[row], captions[row], strict=True):
            centre = left + column_width / 2
            sheet.paste(tile, (round(centre - tile.width / 2), round(middle - tile.height / 2)))
            below = top + row * row_height + row_height - 50 + 8
            draw.text((centre, below), caption[0], INK, small, anchor="mt")
            draw.text((centre, below + 18), caption[1], SOFT, small, anchor="mt")
    return sheet


def curves(
    path: Path,
    lines: Mapping[str, Points],
    title: str,
    xlabel: str,
    ylabel: str,
    logy: bool = False,
    logx: bool = False,
) -> Path:
    """Draw {label: [(x, y), ..]} into a PNG file; points that are not finite are left out."""
    width = 8 + 0.08 * max([0, *(len(shown(name, LABEL)) - 12 for name in lines)])
    charts = {title: {name: [points] for name, points in lines.items()}}
    return panels(path, charts, xlabel, ylabel, logy, logx, size=(width, 4.5))


def panels(
    path: Path,
    charts: Mapping[str, Mapping[str, Sequence[Points]]],
    xlabel: str,
    ylabel: str,
    logy: bool = False,
    logx: bool = False,
    size: tuple[float, float] = (4.2, 3),
    columns: int = 3,
) -> Path:
    """Draw charts side by side into a PNG file, at most ``columns`` in a row, with common axes.

    Args:
        charts: {title: {label: curves of one colour, such as those of several seeds}}; the label stands at their end.
        size: of a chart, in inches of 120 pixels.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(charts))
    rows = math.ceil(len(charts) / columns)
    height = max(size[1], 0.2 * max(map(len, charts.values())))
    figure = Figure(figsize=(size[0] * columns, height * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, (title, lines) in zip(grid, charts.items(), strict=False):
        _style(axes, title, xlabel, ylabel)
        axes.tick_params(labelbottom=True, labelleft=True)
        for i, several in enumerate(lines.values()):
            for points in several:
                finite = sorted(p for p in points if all(map(math.isfinite, p)) and not (logy and p[1] <= 0))
                axes.plot(
                    [x for x, _ in finite],
                    [y for _, y in finite],
                    # More lines than colours differ in their dashes.
                    ("-", "--", ":", "-.")[i // len(PALETTE) % 4],
                    color=PALETTE[i % len(PALETTE)],
                    linewidth=1.6,
                    marker="o" if len(finite) < 25 else None,
                    markersize=3.5,
                )
    for axes in list(figure.axes)[len(charts) :]:
        axes.remove()
    _scale(figure.axes[0], logx, logy)
    for axes, lines in zip(figure.axes, charts.values(), strict=True):
        _label_ends(axes, lines, apart=0.22 / height)
    return save_figure(figure, path)


def _scale(axes: Axes, logx: bool, logy: bool) -> None:
    """Axes that share theirs follow."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    if logx:
        axes.set_xscale("log")
    elif axes.get_xlim()[1] >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if logy:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 100 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(axes: Axes, lines: Mapping[str, Sequence[Points]], apart: float) -> None:
    """Write labels beside the ends of their lines, in their colours and ``apart`` from each other (1: the axis)."""
    drawn = iter(axes.get_lines())
    to_axes, wanted = axes.transData + axes.transAxes.inverted(), []
    for name, several in lines.items():
        own = [next(drawn) for _ in several]
        points = [np.asarray(line.get_xydata()) for line in own]
        ends = [to_axes.transform(each[-1])[1] for each in points if len(each)]
        wanted.append((sum(ends) / len(ends) if ends else 0.0, name, own[0].get_color() if own else INK))
    wanted.sort(key=lambda label: label[0])
    y = -math.inf
    places = [y := max(y + apart, place) for place, _, _ in wanted]
    y = max(1.0, apart * len(places))
    for i in reversed(range(len(places))):
        places[i] = y = min(places[i], y)
        y -= apart
    for place, (_, name, colour) in zip(places, wanted, strict=True):
        text = shown(name, LABEL)
        axes.text(1.02, place, text, color=colour, fontsize=10, va="center", transform=axes.transAxes, parse_math=False)


def chart(title: str, xlabel: str, ylabel: str, width: float = 8) -> tuple[Figure, Axes]:
    """An empty chart in the style of all ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), dpi=120, layout="constrained")
    return figure, _style(figure.add_subplot(), title, xlabel, ylabel)


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> Axes:
    axes.set_title(printable(title), loc="left", fontsize=13, parse_math=False)
    axes.set_xlabel(printable(xlabel), parse_math=False)
    axes.set_ylabel(printable(ylabel), parse_math=False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a matplotlib figure as PNG, atomically and the same on every run; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    write_atomically(path, content.getvalue())
    return path


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a picture, atomically."""
    content = io.BytesIO()
    image.save(content, "PNG")
    write_atomically(path, content.getvalue())
    return path


def data_url(picture: Path) -> str:
    """A PNG file as an address, for pages that need no other file."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def pixels_of(images: np.ndarray | Tensor) -> np.ndarray:
    """uint8 images as they are; float images in [-1, 1] as uint8, what lies outside clipped."""
    tensor = torch.as_tensor(images).detach().cpu()
    return (tensor if tensor.dtype == torch.uint8 else to_uint8(tensor.float())).numpy()


def _legible(resolution: int) -> int:
    return max(1, round(LEGIBLE / resolution))


def _enlarged(image: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(np.kron(image.transpose(1, 2, 0), np.ones((factor, factor, 1), np.uint8)))


def _state_tile(state: State, resolution: int) -> Image.Image:
    picture = Image.fromarray(pixels_of(bands.to_pixels(state.x, state.level)).transpose(1, 2, 0))
    # One whole factor for all states, so that every pixel stays a square.
    enlarge, reduce = max(1, round(STATE / resolution)), math.ceil(resolution / LARGEST)
    size = max(1, picture.width * enlarge // reduce)
    return picture.resize((size, size), Image.Resampling.NEAREST if reduce == 1 else Image.Resampling.BOX)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _heading_height(title: str) -> int:
    return 40 if title else 0


def _heading_width(title: str) -> int:
    return math.ceil(_font(22).getlength(printable(title))) + 2 * MARGIN


def _heading(draw: ImageDraw.ImageDraw, title: str) -> None:
    draw.text((MARGIN, MARGIN), printable(title), INK, _font(22), anchor="lt")


def _arrow(draw: ImageDraw.ImageDraw, x: float, y: float, length: float, forward: bool) -> None:
    draw.line((x, y, x + length, y), SOFT, 2)
    tip, back = (x + length, -7) if forward else (x, 7)
    draw.polygon(((tip, y), (tip + back, y - 5), (tip + back, y + 5)), SOFT)
