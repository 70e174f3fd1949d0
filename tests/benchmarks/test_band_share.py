"""What bands, noise and loss cost beside the network is measured, level by level."""

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def test_the_share_outside_the_network_is_measured_for_every_level(tmp_path: Path) -> None:
    out = tmp_path / "band_share.json"
    command = [sys.executable, "-m", "benchmarks.band_share", "--resolutions", "16", "--turns", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["command"].startswith("python -m benchmarks.band_share ")
    (case,) = found["cases"]
    for kind in ("training", "sampling"):
        assert list(case[kind]) == ["DDPM, level 0", "DVDP, level 0", "DVDP, level 1", "DVDP, level 2"]
        for entry in case[kind].values():
            assert 0 < entry["share"] == entry["outside"] / entry["whole"] < 1
            assert 0 < entry["noise"] < entry["whole"]
