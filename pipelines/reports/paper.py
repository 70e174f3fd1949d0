"""The tables of the paper (Zhang et al., CVPR 2023) as data: what it ran, and the numbers it gives.

Numbers are text, as printed; a number that is empty we do not have. Ours are put beside them by
:mod:`pipelines.reports.paper_scores`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dvdp.config import ProcessName

#: Names of data sets here, for the paper's; see :meth:`Row.is_on`.
_NAMES = {
    "CIFAR-10": "cifar-?10",
    "LSUN Bedroom": "(lsun[-_]?)?bedrooms?",
    "LSUN Church": "(lsun[-_]?)?church(es)?",
    "LSUN Cat": "(lsun[-_]?)?cats?",
    "FFHQ": "ffhq",
    "CelebA": "celeba",
}
#: Timesteps of the paper's processes, and steps of its sampling where it tells no other number.
TIMESTEPS = 1000


@dataclass(frozen=True)
class Row:
    """One setting on one data set."""

    data_set: str
    resolution: int
    """In pixels."""
    setting: str
    process: ProcessName | None = None
    """None for another method, which is not trained here."""
    turning_points: tuple[int, ...] = ()
    sampling: tuple[str, int] | None = None
    """Solver and steps, where the table has one setting with several."""
    fid: str = ""
    seconds_per_iteration: str = ""
    training_speedup: str = ""
    seconds_per_sample: str = ""
    sampling_speedup: str = ""

    @property
    def lift(self) -> str:
        """``sampling.lift`` of the paper that the process comes from: Jing et al. add the variance of the data."""
        return "data" if self.process == "subspace" else "noise"

    @property
    def training_images(self) -> int:
        """Those of our preset of this size: the paper does not say how long it trained."""
        return 64_000_000 if self.resolution == 32 else 12_000_000 if self.resolution >= 256 else 6_400_000

    def is_on(self, name: str) -> bool:
        """Whether a data set of this name is the row's, e.g. ``church``, ``lsun-church256`` or ``cifar10-images``."""
        pattern = rf"{_NAMES[self.data_set]}([-_]?{self.resolution}(px)?)?([-_](images|train|aligned))*"
        return re.fullmatch(pattern, name.lower()) is not None


@dataclass(frozen=True)
class Table:
    """A table, or a figure by its numbers."""

    title: str
    rows: tuple[Row, ...]
    samples: int = 50_000
    """Behind every FID."""
    two_networks: bool = False
    """Whether each level has a network of its own."""
    note: str = ""


def _table1() -> tuple[Row, ...]:
    """DDPM is the paper's own ("DDPM*"), on one A100; batch 128 and 256 at 32 px, 24 and 64 at 256 px."""
    cifar10 = (
        Row("CIFAR-10", 32, "DDPM", "ddpm", (), None, "3.16", "0.18", "", "0.34"),
        Row("CIFAR-10", 32, "DVDP {600}", "dvdp", (600,), None, "3.24", "0.15", "1.2", "0.26", "1.3"),
    )
    fids = {
        "LSUN Bedroom": ("5.74", "4.88"),
        "LSUN Church": ("7.54", "7.03"),
        "LSUN Cat": ("18.11", "16.50"),
        "FFHQ": ("8.33", "8.03"),
    }
    large = (
        (
            Row(name, 256, "DDPM", "ddpm", (), None, ddpm, "0.99", "", "12.2"),
            Row(name, 256, "DVDP {300, 600}", "dvdp", (300, 600), None, dvdp, "0.45", "2.2", "5.01", "2.4"),
        )
        for name, (ddpm, dvdp) in fids.items()
    )
    return cifar10 + tuple(row for pair in large for row in pair)


_FOUR = (200, 400, 600, 800)

TABLES = (
    Table("Table 1: DDPM and DVDP", _table1()),
    Table(
        "Table 2: FFHQ at 1024 px",
        (
            Row("FFHQ", 1024, "Score-SDE", fid="52.40"),
            Row("FFHQ", 1024, "CDM, 98 M parameters", fid="24.7"),
            Row("FFHQ", 1024, "CDM, 165 M parameters", fid="17.35"),
            Row("FFHQ", 1024, "CDM, 286 M parameters", fid="17.24"),
            Row("FFHQ", 1024, "DVDP {200, 400, 600, 800}, DDIM", "dvdp", _FOUR, ("ddim", 675), "12.43"),
            Row("FFHQ", 1024, "DVDP {200, 400, 600, 800}, ancestral", "dvdp", _FOUR, ("ddpm", 1000), "10.46"),
        ),
        samples=10_000,
    ),
    Table(
        "Table 3: the number of turning points",
        (
            Row("CelebA", 128, "K = 0", "ddpm", (), None, "6.14", "", "1", "", "1"),
            Row("CelebA", 128, "K = 1, {250}", "dvdp", (250,), None, "5.99", "", "1.98", "", "2.12"),
            Row("CelebA", 128, "K = 2, {250, 500}", "dvdp", (250, 500), None, "6.10", "", "2.24", "", "2.36"),
            Row("CelebA", 128, "K = 3, {250, 500, 750}", "dvdp", (250, 500, 750), None, "6.37", "", "2.25", "", "2.43"),
        ),
    ),
    Table(
        "Fig. 4: DVDP and subspace diffusion over T_1",
        tuple(
            row
            for T in range(100, 900, 100)
            for row in (
                Row("CelebA", 64, f"DVDP {{{T}}}", "dvdp", (T,)),
                Row("CelebA", 64, f"subspace {{{T}}}", "subspace", (T,)),
            )
        ),
        two_networks=True,
        note="The paper draws curves: DVDP below subspace diffusion at every T_1, and more so at small T_1. The values"
        " of T_1 here are those of presets/fig4-celeba64.yaml.",
    ),
)
FIGURE_4 = TABLES[-1]
