"""What `dvdp audit` prints."""

from __future__ import annotations

from dvdp.audit.result import Audit, Score
from pipelines.commands.audit import summary

SCORES = {"free": 4.0, "before_1": 3.0, "after_1": 2.5, "real": 2.0}
AUDIT = Audit(
    metric="fd_labels", images=64, resolution=32, timesteps=1000, turning_points=(600,),
    sampling={"solver": "ddpm", "steps": 250}, solver=None,
    scores={start: Score(value, (value, value)) for start, value in SCORES.items()}, states=(),
)  # fmt: skip
LIKELIHOOD = {
    "bits_per_dim": 3.5, "bits_per_dim_error": 0.052, "bits_per_dim_images": 256.0,
    "bits_per_dim_prior": 0.0001, "bits_per_dim_level_1": 0.25, "bits_per_dim_lift_1": 0.005,
    "bits_per_dim_level_0": 1.0, "bits_per_dim_decoder": 2.2449,
}  # fmt: skip


def test_the_likelihood_is_told_part_by_part_beside_the_score() -> None:
    assert "bits" not in summary(AUDIT, "dvdp", {})
    shown = [" ".join(line.split()) for line in summary(AUDIT, "dvdp", LIKELIHOOD).splitlines()]
    first = shown.index("likelihood bits per dimension 256 real images")
    assert shown[first + 1 : first + 7] == [
        "prior 0.0001",
        "level 1 (t = 1000 to 600, 16 px) 0.2500",
        "the lift at t = 600 0.0050",
        "level 0 (t = 600 to 0, 32 px) 1.0000",
        "decoder 2.2449",
        "all (a bound) 3.5000 ± 0.052",
    ]
