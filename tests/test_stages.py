"""What the stages before the experiment tell people."""

from dataclasses import replace
from pathlib import Path

import pytest

from dvdp.config import DatasetParams, Params
from pipelines.stages import prepare_data
from tests.data.support import make_images, png
from tests.logs import hearing


def test_prepare_tells_what_was_left_out_in_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = make_images(tmp_path / "pets", 3)
    (images / "cat" / "000_mask.png").write_bytes(png())
    (images / "cat" / "copy.png").write_bytes((images / "cat" / "000.png").read_bytes())
    (images / "cat" / "broken.png").write_bytes(b"no image")
    for i in range(120):
        (images / "dog" / f"{i}.txt").write_text("a caption")
    dataset = DatasetParams(
        name="pets", source="image_folder", path=images, resolution=16, deduplicate=True, max_skipped=0.5
    )
    lines: list[str] = []
    with hearing(lines.append):
        prepare_data(replace(Params(), dataset=dataset))
    assert lines[-1] == (
        "6 images of 16 px in data/pets/store, left out: 1 unreadable (no image in a known format), 1 duplicates,"
        " 1 mask, 120 other format"
    )
