"""Two ways of drawing levels alike on all ranks, compared for speed and score at {300, 600}.

    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1 \\
        python -m benchmarks.level_draws --params benchmarks/study_digits.yaml --work /tmp/study --out draws.json

*whole*: a step has one level, its share exact over blocks of 100 steps (what dvdp does). *split*: every batch is split
over the levels by their shares. Both see the same number of images at every level. The split variant lives here alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.study import prepared, sampled_metrics
from dvdp.config import Params, Run, read_params
from dvdp.data.store import ImageStore
from dvdp.files import write_atomically
from dvdp.training.loop import Training


class Split(Training):
    """Every batch holds all levels, by their shares."""

    def update(self, level: int, batch: Tensor) -> None:
        """One step; the level that the loop drew is not used."""
        shares = self.process.schedule.shares()
        sizes = [round(len(batch) * share) for share in shares[:-1]]
        parts = batch.split([*sizes, len(batch) - sum(sizes)])
        self.optimizer.zero_grad()
        for k, part in enumerate(parts):
            # Gradients add up: scale each part's mean loss to its share of the batch.
            before = [None if p.grad is None else p.grad.clone() for p in self.network.parameters()]
            self.optimizer.zero_grad()
            loss = self._backward(self.live, k, part)
            for parameter, grad in zip(self.network.parameters(), before, strict=True):
                if parameter.grad is not None:
                    parameter.grad *= len(part) / len(batch)
                    if grad is not None:
                        parameter.grad += grad
                else:
                    parameter.grad = grad
            self.window[:, k] += torch.stack([loss, torch.zeros_like(loss), torch.ones_like(loss)])
        nn.utils.clip_grad_norm_(self.network.parameters(), self.run.training.clip_norm)
        self.optimizer.step()


def main() -> None:
    """Train, sample and score both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    store = prepared(params, options.work / params.dataset.name, None)
    setting = next(s for s in params.settings if s.turning_points == (300, 600))
    results = []
    for seed in options.seeds:
        run = params.run(setting, seed)
        for name, kind in (("whole", Training), ("split", Split)):
            results.append({"draw": name, "seed": seed, **_measure(params, run, store, kind, options.work, name)})
            print(json.dumps(results[-1]), flush=True)
            write_atomically(options.out, json.dumps({"machine": machine(), "runs": results}, indent=2) + "\n")


def _measure(
    params: Params, run: Run, store: ImageStore, kind: type[Training], work: Path, name: str
) -> dict[str, float]:
    folder = work / "draws" / f"{name}-{run.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    kind(run, store, folder, name, False, torch.device("cpu"), None, print).run_to_end(0)
    seconds = time.perf_counter() - start
    metrics = sampled_metrics(params, run.sampling, folder / "weights.safetensors", folder / "samples", work)
    return {"training_seconds": round(seconds, 1), **{k: round(v, 4) for k, v in metrics.items()}}


if __name__ == "__main__":
    main()
