"""Tables and a plot of what ``benchmarks.steps`` and ``benchmarks.ranks`` measured, written into the docs.

python -m benchmarks.steps_report benchmarks/results/steps.json --ranks benchmarks/results/ranks.json --docs docs
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path
from typing import Any

from dvdp.errors import UserError
from dvdp.files import write_atomically

#: Around what is generated of something, in docs/performance.md.
BEGIN, END = "<!-- {}: begin, made by benchmarks.steps_report -->", "<!-- {}: end -->"
#: What is asked for on a CPU at the arithmetic-bound size: which ratio, and at least how much.
GOALS = {
    "64 px, fp32, training, DDPM over DVDP, one level a step": 2.38,
    "64 px, fp32, training, DDPM over DVDP, all levels a step": 2.38,
    "64 px, fp32, sampling, DDPM over DVDP": 2.43,
    "64 px, fp32, training, diffusers over ours": 1.15,
    "64 px, bf16, training, diffusers over ours": 1.15,
    "64 px, bf16, training, diffusers in fp32 over ours": 1.8,
}


def main() -> None:
    """Write ``performance.md``'s tables and ``pictures/steps.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--ranks", type=Path)
    parser.add_argument("--docs", type=Path, required=True)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    page = options.docs / "performance.md"
    print(goals(result["ratios"]))
    text = put_in(page.read_text(), "goals", goals(result["ratios"]))
    text = put_in(text, "steps", table(result))
    if options.ranks:
        text = put_in(text, "ranks", ranks_table(json.loads(options.ranks.read_text())))
    write_atomically(page, text)
    write_atomically(options.docs / "pictures/steps.png", plot(result))


def put_in(page: str, name: str, text: str) -> str:
    """The page with the text between the marks of this name."""
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in page or end not in page:
        raise UserError(f"--docs: found no '{begin}' in performance.md, expected the place for the table; put it back.")
    return re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def goals(ratios: dict[str, float]) -> str:
    """Markdown: what is asked for beside what was found."""
    lines = ["| goal | at least | found | met |", "|---|---|---|---|"]
    for name, least in GOALS.items():
        found = f"{ratios[name]:.2f}x" if name in ratios else "not measured"
        met = "yes" if ratios.get(name, 0.0) >= least else "**no**"
        lines.append(f"| {name} | {least:.2f}x | {found} | {met} |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Markdown: a table of ratios, one of seconds, utilisation and memory, and what they were measured on."""
    theirs = any("diffusers" in case["parameters"] for case in result["cases"])
    lines = [
        "| px | | DDPM over DVDP, training: `all` | `one` | bound | sampling | bound |"
        + (" diffusers over ours, training | sampling | their fp32 over ours, training |" if theirs else ""),
        "|---|---|---|---|---|---|---|" + ("---|---|---|" if theirs else ""),
    ]
    for case, precision in rows(result):
        about = f"{case['resolution']} px, {precision}, "

        def ratio(name: str, about: str = about) -> str:
            value = result["ratios"].get(about + name)
            return "" if value is None else f"{value:.2f}x"

        cells = [
            str(case["resolution"]),
            precision,
            ratio("training, DDPM over DVDP, all levels a step"),
            ratio("training, DDPM over DVDP, one level a step"),
            f"{case['bounds']['training']:.2f}x",
            ratio("sampling, DDPM over DVDP"),
            f"{case['bounds']['sampling']:.2f}x",
        ]
        if theirs:
            cells += [
                ratio("training, diffusers over ours"),
                ratio("sampling, diffusers over ours"),
                ratio("training, diffusers in fp32 over ours"),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| px | | network and batch | | seconds a step | TFLOP/s | of the peak | GiB | seconds a sampling call |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, precision in rows(result):
        peak = max(result["peak_tflops"][precision].values())
        for name, speed in case["training_tflops_per_second"].items():
            if name.split()[0] != precision:
                continue
            what, seconds = name.removeprefix(precision + " "), case["training_seconds"][name]
            cells = [
                *((str(case["resolution"]), precision, size(case)) if what == "ddpm" else ("", "", "")),
                {"ddpm": "DDPM", "all levels": "DVDP, `all`"}.get(what, what.replace("level", "DVDP, level")),
                f"{seconds:.3f}",
                f"{speed:.3f}",
                f"{speed / peak:.0%}",
                f"{case['training_memory_gib'][name]:.2f}",
                call(case, precision, what),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    about = result["machine"]
    lines += [
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread; GPU: {about['gpu']}; torch"
        f" {about['torch']}, Python {about['python']}; MALLOC_MMAP_THRESHOLD_ {about['malloc']}; medians of"
        f" {result['turns']} turns, of {result['seconds_of']}; commit"
        f" {about['commit']}; `{about['command']}`. The peak is the faster of a matrix product and a 3x3 convolution"
        f" in the same process: {peaks(result)}. Memory is what a step takes beside weights, moments and average.",
    ]
    if theirs:
        lines += ["", matched(result)]
    return "\n".join(lines)


def ranks_table(result: dict[str, Any]) -> str:
    """Markdown: the share of the bound kept, computed and measured."""
    names = list(next(iter(result["computed"][0]["share_of_bound_kept"].values())))
    lines = [f"| px | | ranks | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for case in result["computed"]:
        for ranks, kept in case["share_of_bound_kept"].items():
            cells = [str(case["resolution"]), case["precision"], ranks, *(f"{kept[name]:.0%}" for name in names)]
            lines.append(f"| {' | '.join(cells)} |")
    for case in result["measured"]:
        kept = case["share_of_bound_kept"]
        shares = [f"{kept[name]:.0%}" if name in kept else "" for name in names]
        lines.append(
            f"| {case['resolution']} | {case['precision']}, measured | {case['ranks']} | {' | '.join(shares)} |"
        )
    return "\n".join(lines)


def rows(result: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Cases and the precisions that each was measured in."""
    return [(case, precision) for case in result["cases"] for precision in case["sampling_seconds_per_call"]]


def size(case: dict[str, Any]) -> str:
    """A network and its batch, for people."""
    network = case["network"]
    widths = "-".join(str(network["model_channels"] * multiplier) for multiplier in network["channel_mult"])
    return f"{widths}, batch {case['batch']}"


def call(case: dict[str, Any], precision: str, what: str) -> str:
    """Seconds of one network call of sampling, with its step."""
    if what.startswith("level "):
        return f"{case['sampling_seconds_per_call'][precision][int(what[6:])]:.3f}"
    whole = case["sampling_seconds"].get(f"{precision} {'dvdp' if what == 'all levels' else what}")
    return "" if whole is None else f"{whole / case['sampling_steps']:.3f}"


def peaks(result: dict[str, Any]) -> str:
    """What the machine can do, for people."""
    return "; ".join(
        f"{precision} {', '.join(f'{name} {value:.3f}' for name, value in found.items())} TFLOP/s"
        for precision, found in result["peak_tflops"].items()
    )


def matched(result: dict[str, Any]) -> str:
    """How alike the two networks are."""
    parts = []
    for case in result["cases"]:
        if "diffusers" in case["parameters"]:
            flops = case["forward_flops"]
            written = flops["levels, every convolution as written"][0]
            parts.append(
                f"{case['resolution']} px: {case['parameters']['ours']:,} and {case['parameters']['diffusers']:,}"
                f" parameters, {written / 2e9:.3f} and {flops['diffusers'] / 2e9:.3f} GMAC an image, of which ours does"
                f" {flops['levels'][0] / 2e9:.3f}"
            )
    return f"Ours and diffusers' network: {'; '.join(parts)} (what an enlargement repeats is computed once)."


def plot(result: dict[str, Any]) -> bytes:
    """Ratios by size, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.patch.set_facecolor("white")
    titles = {
        "DDPM over DVDP {300, 600}": {
            "training, DDPM over DVDP, all levels a step": "training, all levels a step",
            "training, DDPM over DVDP, one level a step": "training, one level a step",
            "sampling, DDPM over DVDP": "sampling",
        },
        "diffusers over ours": {
            "training, diffusers over ours": "training",
            "sampling, diffusers over ours": "sampling",
            "training, diffusers in fp32 over ours": "training, theirs in fp32",
        },
    }
    names = [f"{case['resolution']} px\n{precision}" for case, precision in rows(result)]
    for axes, (title, series) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        width = 0.8 / len(series)
        for i, (ratio, label) in enumerate(series.items()):
            values = [
                result["ratios"].get(f"{case['resolution']} px, {precision}, {ratio}", 0.0)
                for case, precision in rows(result)
            ]
            places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(names))]
            axes.bar(places, values, width, label=label)
        if title.startswith("DDPM"):
            for place, (case, _) in enumerate(rows(result)):
                level = case["bounds"]["training"]
                axes.plot([place - 0.45, place + 0.45], [level, level], color="black", linewidth=1)
            axes.plot([], [], color="black", linewidth=1, label="what the FLOPs allow")
        else:
            axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set_title(title)
        axes.set_ylabel("times as fast")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.35)
        axes.legend(fontsize=7, loc="upper left", ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


if __name__ == "__main__":
    main()
