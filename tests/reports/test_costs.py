"""What runs took stands beside what was estimated."""

import json
from pathlib import Path

from dvdp.files import write_atomically
from pipelines.reports.costs import costs
from tests.reports.test_comparison import results


def test_minutes_memory_and_disk_are_those_of_log_and_files_beside_the_estimate(tmp_path: Path) -> None:
    first, second, *_ = results(tmp_path, {"ddpm": (4.0, 6.0), "dvdp": (3.0, 3.0)})
    lines = [
        {"images": images, "time": 1.0, "metrics": {"images_per_second": rate, "memory_gib": gib}}
        for images, rate, gib in ((6000, 50.0, 1.0), (12000, 100.0, 1.25))
    ]
    folder = first.job.folder
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(folder / "checkpoints" / "000000012000.safetensors", bytes(2**30 // 100))
    said = {"images": 12000, "flops": 1.0, "seconds": 150.0, "memory_bytes": 3 << 29, "disk_bytes": 1 << 29}
    write_atomically(folder / "estimate.json", json.dumps(said))
    headings, cells = costs([first, second])
    assert len(headings) == len(cells[0]) == len(cells[1]) == 7
    assert cells[0][1:] == ["2.5", "3.0", "1.50", "1.25", "0.500", "0.010"]
    assert cells[1][1:4:2] == ["-", "-"], "a run without an estimate"
