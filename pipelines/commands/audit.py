"""``dvdp audit``: the tables that it prints, and what it adds to MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from dvdp.audit.result import FREE, REAL, Audit
from dvdp.evaluation.likelihood import METRIC
from dvdp.models.flops import training_images
from pipelines.jobs.audit import AuditJob
from pipelines.jobs.likelihood import known_likelihood
from pipelines.reports.text_tables import as_text
from pipelines.tracking.connection import connect, reaching


def summary(audit: Audit, name: str, likelihood: Mapping[str, float] | None = None) -> str:
    """Tables for a terminal, and one sentence.

    Args:
        likelihood: of real images, as :func:`pipelines.jobs.likelihood.known_likelihood` has it.
    """
    found = audit.attribution
    lines = [["as many real images", f"{audit.scores[REAL].value:.3f}", ""]]
    lines += [[audit.title(part), f"{cost:+.3f}", f"± {found.error:.2g}"] for part, cost in found.costs.items()]
    how = f"{audit.sampling['solver']}, {audit.sampling['steps']} steps"
    lines.append([f"samples ({how})", f"{audit.scores[FREE].value:.3f}", ""])
    if audit.solver is not None and found.solver is not None:
        many = f"against {audit.solver['solver']}, {audit.solver['steps']} steps"
        lines.append([f"of which the solver ({many})", f"{found.solver:+.3f}", f"± {found.error:.2g}"])
    tables = [as_text([name, audit.metric, f"{audit.images} images"], lines)]
    if audit.states:
        headings = ["just before the lift", "size of bands against true, finest first", "means apart", "Frechet"]
        cells = []
        for state in reversed(audit.states):
            ratios = [
                f"{a / b:.3f} ± {error:.3f}"
                for a, b, error in zip(state.generated, state.true, state.errors, strict=True)
            ]
            cells.append(
                [
                    f"t = {state.turning_point}, {audit.resolution >> state.level} px",
                    ", ".join(ratios),
                    f"{state.mean_difference:.3f} (floor {state.mean_floor:.3f})",
                    f"{state.distance:.2f} (floor {state.distance_floor:.2f})",
                ]
            )
        tables.append(as_text(headings, cells))
    if likelihood:
        images, error = likelihood[f"{METRIC}_images"], likelihood[f"{METRIC}_error"]
        cells = [[_part(audit, part), f"{bits:.4f}", ""] for part, bits in _bits(likelihood).items()]
        cells.append(["all (a bound)", f"{likelihood[METRIC]:.4f}", f"± {error:.2g}"])
        tables.append(as_text(["likelihood", "bits per dimension", f"{images:.0f} real images"], cells))
    return "\n\n".join([*tables, f"{name}: {audit.verdict}"])


def _bits(likelihood: Mapping[str, float]) -> dict[str, float]:
    """By term."""
    terms = {name.removeprefix(f"{METRIC}_"): bits for name, bits in likelihood.items() if name != METRIC}
    return {name: bits for name, bits in terms.items() if name not in ("error", "images")}


def _part(audit: Audit, term: str) -> str:
    return audit.title(term) if term.startswith(("level", "lift")) else term


def track(audit: AuditJob, result: Audit) -> None:
    """Put the audit into the MLflow run of its job; again changes nothing.

    Raises:
        TrackingUnavailable: MLflow does not answer; everything is on disk.
    """
    from pipelines.tracking.job_runs import tracked

    job, found = audit.job, result.attribution
    metrics = {f"audit/score/{start}": score.value for start, score in result.scores.items()}
    metrics |= {f"audit/cost/{part}": cost for part, cost in found.costs.items()}
    metrics |= {"audit/cost/total": found.total, "audit/cost/error": found.error}
    if found.solver is not None:
        metrics["audit/cost/solver"] = found.solver
    for state in result.states:
        at = f"audit/state/{state.level}"
        metrics |= {f"{at}/distance": state.distance, f"{at}/distance_floor": state.distance_floor}
        metrics |= {f"{at}/mean_difference": state.mean_difference, f"{at}/mean_floor": state.mean_floor}
        for band, (ours, true) in enumerate(zip(state.generated, state.true, strict=True), start=state.level):
            metrics[f"{at}/band_{band}"] = ours / true
    metrics |= {f"audit/bits/{part}": bits for part, bits in _bits(known_likelihood(job)).items()}
    with reaching(connect(), audit.result.parent):
        run = tracked(job)
        run.set_metrics(metrics, step=training_images(job.run))
        run.log_file(audit.result, "audit")
        run.log_file(audit.chart, "audit")
        run.set_tags({"dvdp.audit": result.verdict})
        run.set_status("FINISHED")
