"""``training.compile``: the same training by torch.compile."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvdp.config import Run, parse_params
from dvdp.data.loading import ArrayImages
from dvdp.training.loop import train
from tests.logs import InterruptedHere, stop_after

IMAGES = ArrayImages(np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))


def tiny_run(*, compiled: bool) -> Run:
    tree = {
        "dataset": {"resolution": 8},
        "settings": {"small": {"process": "dvdp", "turning_points": [500]}},
        "model": {
            "model_channels": 4, "channel_mult": [1], "attention_factors": [], "num_head_channels": 4, "num_classes": 0,
        },
        "training": {
            "images": 48, "budget": "images", "batch": 8, "warmup_images": 8, "checkpoint_images": 24, "log_images": 8,
            "preview_images": 0, "compile": compiled, "optimizer": "adamw", "precision": "fp32",
        },
    }  # fmt: skip
    return parse_params(tree).runs()[0]


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_network_trains_as_the_other_does_and_resumes_to_the_bit(tmp_path: Path) -> None:
    run = tiny_run(compiled=True)
    train(tiny_run(compiled=False), IMAGES, tmp_path / "eager", "abc")
    train(run, IMAGES, tmp_path / "whole", "abc")
    with pytest.raises(InterruptedHere), stop_after(32):
        train(run, IMAGES, tmp_path / "broken", "abc")
    train(run, IMAGES, tmp_path / "broken", "abc")
    eager, whole, broken = (load_file(tmp_path / name / "weights.safetensors") for name in ("eager", "whole", "broken"))
    for name, weight in eager.items():
        torch.testing.assert_close(whole[name], weight, atol=1e-4, rtol=1e-3)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.slow
def test_without_a_compiler_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own, as torch finds its compiler once."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.models.test_compilation import IMAGES, tiny_run\n"
        "from dvdp.errors import UserError\n"
        "from dvdp.training.loop import train\n"
        "try: train(tiny_run(compiled=True), IMAGES, Path(sys.argv[1]), 'abc')\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sentence = done.stdout.splitlines()[-1]
    assert sentence.startswith("training.compile: found true, but torch.compile fails here ("), done.stdout
    assert sentence.endswith("install it, or set it to false.")


def test_weights_of_a_compiled_run_have_a_name_of_their_own() -> None:
    from dvdp.identity import training_hash

    runs = [tiny_run(compiled=compiled) for compiled in (True, False)]
    assert dataclasses.replace(runs[0], training=runs[1].training) == runs[1]
    assert len({training_hash(run, "digest", False) for run in runs}) == 2
