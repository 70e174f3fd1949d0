"""Which level costs the settings of a study their score; see dvdp/evaluation/audit.py.

    OMP_NUM_THREADS=1 python -m benchmarks.study_audit --params benchmarks/study_digits.yaml --work /tmp/study \\
        --settings dvdp-600 --out audit.json

Reads the networks that benchmarks/study.py trained, in its ``--work`` folder, and audits each as the study samples, or
by the solver, timestep_spacing and steps that are given.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from benchmarks.machine import machine
from benchmarks.study import metric, prepared, trained
from dvdp.audit.result import Audit
from dvdp.audit.run import audit
from dvdp.config import Run, read_params
from dvdp.evaluation.extractors import load_extractor
from dvdp.evaluation.reference import measure, read_features, read_reference
from dvdp.files import write_atomically
from dvdp.identity import sampling_hash
from dvdp.models.export import load_model


def main() -> None:
    """Audit one setting and seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", required=True)
    parser.add_argument("--work", type=Path, required=True, help="of benchmarks/study.py")
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--solver")
    parser.add_argument("--timestep-spacing")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = read_params(options.params)
    asked = {name: getattr(options, name) for name in ("solver", "timestep_spacing", "steps")}
    sampling = replace(params.sampling, **{name: value for name, value in asked.items() if value is not None})
    store = prepared(params, options.work / params.dataset.name, None)
    data = options.work / params.dataset.name
    extractor, reference = load_extractor(data / "extractor"), data / "reference"
    real = read_features(reference, read_reference(reference))
    half = params.evaluation.samples // 2

    def score(images: Dataset) -> float:
        subset = min(params.evaluation.kid_subset, half)
        return measure(images, real, extractor, subset, False)[metric(params)]

    rows: list[dict[str, object]] = []
    for run, folder in trained(params, options.settings, options.work, store):
        way = sampling_hash(replace(run, sampling=sampling), folder.name)
        kept = folder / f"audit-{way}-{params.evaluation.samples}.json"
        if not kept.exists():
            model = load_model(folder / "weights.safetensors", sampling=sampling)
            found = audit(
                model.process,
                model.denoiser,
                store,
                score,
                params.evaluation.samples,
                sampling.options(),
                batch=sampling.batch,
                metric=metric(params),
                classes=model.classes,
            )
            write_atomically(kept, found.to_json())
        rows.append(_row(run, Audit.from_json(kept.read_text(), str(kept))))
        print(json.dumps(rows[-1]), flush=True)
        content = {
            "machine": machine(),
            "metric": metric(params),
            "sampling": sampling.options(),
            "means": _means(rows),
            "runs": rows,
        }
        write_atomically(options.out, json.dumps(content, indent=2) + "\n")


def _row(run: Run, found: Audit) -> dict[str, object]:
    attribution = found.attribution
    return {
        "setting": run.setting,
        "seed": run.seed,
        "scores": {start: round(s.value, 4) for start, s in found.scores.items()},
        "costs": {part: round(cost, 4) for part, cost in attribution.costs.items()},
        "solver": None if attribution.solver is None else round(attribution.solver, 4),
        "error": round(attribution.error, 4),
        "bands": {
            str(s.turning_point): [round(a / b, 4) for a, b in zip(s.generated, s.true, strict=True)]
            for s in found.states
        },
    }


def _means(rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Of the costs over seeds, by setting."""
    means: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(str(row["setting"]) for row in rows):
        costs = [row["costs"] for row in rows if row["setting"] == name]
        parts = [cost for cost in costs if isinstance(cost, dict)]
        means[name] = {part: round(statistics.mean(cost[part] for cost in parts), 4) for part in parts[0]}
    return means


if __name__ == "__main__":
    main()
