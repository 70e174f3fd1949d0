"""Features, audit and divergences on a fake GPU: what goes there, and that scores come back to the host."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.gpu.fake import fake_gpu
from dvdp.audit.run import FEWEST, audit
from dvdp.evaluation import extractors, fidelity
from dvdp.evaluation.extractors import inception_extractor, load_extractor, train_extractor
from dvdp.models.export import load_model
from dvdp.models.pixels import to_float
from dvdp.planning.fisher import orthogonal_divergences
from tests.gpu.support import GPU, IMAGES, SMALL, tiny_run, trained


class Pixels(Dataset[Tensor]):
    """The images of the support as torch-fidelity takes them."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(IMAGES[index][0])


def test_features_are_computed_on_the_gpu_and_brought_back(tmp_path: Path) -> None:
    train_extractor(IMAGES, "labels", 1, "digest", tmp_path)
    extractor = load_extractor(tmp_path)
    with fake_gpu() as gpu:
        found = fidelity.features_of(Pixels(), extractor, gpu=True)
        assert {(k.dtype, line.function.split()[0]) for k, line, _ in gpu.launches if k.operator == "convolution"} == {
            (torch.float32, "dvdp/evaluation/extractors.py")
        }
        assert sum(copy.to_host for copy in gpu.copies) == 2, "features and logits of the one batch"
    assert (found.pooled.shape, found.pooled.dtype, found.pooled.device.type) == ((40, 64), torch.float64, "cpu")
    assert found.logits.shape == (40, 3)


def test_inception_of_torch_fidelity_runs_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Weights of no meaning: the network cannot be built without.
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"none")
    monkeypatch.setattr(torch, "load", lambda *_, **__: None)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.file_sha256(weights))
    with fake_gpu() as gpu, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fidelity.features_of(Pixels(), inception_extractor(weights), gpu=True)
        assert sum(k.flops for k, *_ in gpu.launches) > 40 * 5e9
    assert found.pooled.shape == (40, 2048)


def test_an_audit_draws_on_the_gpu_and_scores_on_the_host(tmp_path: Path) -> None:
    class Many(Pixels):
        def __len__(self) -> int:
            return FEWEST

        def __getitem__(self, index: int) -> tuple[object, int]:  # type: ignore[override]
            return IMAGES[index % len(IMAGES)]

    weights = trained(tiny_run(SMALL), tmp_path / "weights.safetensors")
    scored: list[torch.device] = []

    def score(images: Dataset) -> float:
        scored.append(images[0].device)
        return 1.0

    with fake_gpu():
        model = load_model(weights, "cuda")
        found = audit(
            model.process,
            model.denoiser,
            Many(),  # type: ignore[arg-type]
            score,
            FEWEST,
            model.run.sampling.options(2),
            solver_steps=4,
            device=model.device,
            classes=model.classes,
        )
    assert set(scored) == {torch.device("cpu")}
    assert list(found.scores) == ["free", "before_1", "after_1", "real", "solver"]
    assert len(found.states) == 1


def test_divergences_of_bands_are_measured_on_the_gpu(tmp_path: Path) -> None:
    weights = trained(tiny_run(SMALL), tmp_path / "weights.safetensors")
    with fake_gpu():
        model = load_model(weights, "cuda")
        images = to_float(torch.stack([Pixels()[i] for i in range(4)])).to(GPU)
        labels = torch.zeros(4, dtype=torch.long)
        rows = orthogonal_divergences(model.process, model.denoiser, images, [100, 600], 2, labels=labels)
    assert [[value is None for value in row] for row in rows] == [[False, False], [True, False]]
