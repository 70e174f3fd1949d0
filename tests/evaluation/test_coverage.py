"""Precision and recall are torch-fidelity's figures, in a fraction of its memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from dvdp.evaluation.coverage import NEIGHBOURS, precision_recall


@pytest.mark.parametrize(
    ("generated", "real", "features", "dtype"),
    [(300, 1700, 64, torch.float64), (1300, 700, 64, torch.float64), (600, 600, 2048, torch.float32), (4, 5, 1, None)],
)
def test_both_are_those_of_torch_fidelity(generated: int, real: int, features: int, dtype: torch.dtype | None) -> None:
    """At 1300 images the last rows do not fill the buffer that the earlier ones did."""
    random = torch.Generator().manual_seed(generated)
    a = torch.randn(generated, features, generator=random, dtype=dtype)
    b = 1 + torch.randn(real, features, generator=random, dtype=dtype)
    theirs = prc_features_to_metric(
        a, b, prc_neighborhood=NEIGHBOURS, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    assert precision_recall(a, b) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_points_lie_in_balls_of_no_radius_around_themselves() -> None:
    """Five equal images have their third neighbour at no distance, which rounding must not hide."""
    random = torch.Generator().manual_seed(0)
    images = (37 * torch.rand(200, 64, generator=random, dtype=torch.float64)).repeat(5, 1)
    elsewhere = images + 1e-3
    assert precision_recall(images, images) == (1, 1)
    assert precision_recall(images, elsewhere) == (0, 0)


def test_memory_grows_with_the_images_not_with_their_pairs() -> None:
    """With the allocator as training has it: 12,000 real images have 1.15 GB of distances between them."""
    script = """if True:
        import resource, torch
        from dvdp.evaluation.coverage import precision_recall

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

        a, b = (torch.randn(n, 64, dtype=torch.float64) for n in (1000, 12_000))
        precision_recall(a, b[:1000])
        before = peak()
        precision_recall(a, b)
        print(peak() - before)
    """
    allocator = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **allocator}, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.2
