"""Whatever a params file holds, `dvdp check` answers with a result or one sentence, in little time and memory."""

from __future__ import annotations

import contextlib
import datetime
import io
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dvdp.config import Params
from dvdp.yaml_files import dump_yaml
from pipelines.cli import main

DEFAULTS = Params().describe()
SECTIONS = [name for name, value in DEFAULTS.items() if isinstance(value, dict) and name != "settings"]
WORDS = (
    "", " ", "64", "1e3", "true", "auto", "none", "../up", "~", "a" * 300, "new\nline", "nul\0", "\x1b[31m", "\u202e",
    "cost", "cosine", "squared_cosine", "per_level", "subspace", "one", "logsnr", "fixed_large", "inception", "{{x}}",
)  # fmt: skip
WHOLE = (
    0, 1, -1, 2, 3, 4, 7, 8, 16, 100, 256, 1000, 1024, 4096, 10_000, 100_000, 10**6, 10**7, 10**9, 10**12, 2**63 - 1,
    2**63, 10**39,
)  # fmt: skip
REAL = (
    0.0, -0.0, 5e-324, 1e-300, 1e-6, 0.1, 0.5, 1.0, 1.5, -20.0, 20.0, 100.0, 1e3, 1e15, 1e308, float("inf"),
    float("nan"),
)  # fmt: skip

scalars = st.one_of(
    st.sampled_from((*WHOLE, *REAL, *WORDS, None, True, False)), st.integers(), st.floats(), st.text(max_size=8),
    st.just(datetime.date(2020, 1, 1)), st.just(datetime.datetime(2020, 1, 1, 12, 30)),
)  # fmt: skip
odd = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=12,
)


def rarely(strange: st.SearchStrategy[Any], usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 19).flatmap(lambda n: usual if n else strange)


def section(name: str) -> st.SearchStrategy[Any]:
    """Some keys of a section, most with values of the right kind, of any size."""

    def value(key: str) -> st.SearchStrategy[Any]:
        default = DEFAULTS[name][key]
        kinds = {bool: (True, False), int: WHOLE, float: REAL, str: WORDS}
        near = st.sampled_from(kinds.get(type(default), WORDS))
        if isinstance(default, list):
            near = st.lists(st.sampled_from(WHOLE[:10]), max_size=11)
        return rarely(odd, near | st.just(default))

    keys = st.lists(st.sampled_from(list(DEFAULTS[name])), max_size=2, unique=True)
    return rarely(odd, keys.flatmap(lambda chosen: st.fixed_dictionaries({key: value(key) for key in chosen})))


OVERRIDABLE = ["schedule", "model", "training", "sampling"]
overrides = st.lists(st.sampled_from(OVERRIDABLE), max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: section(name) for name in names})
)
setting = st.fixed_dictionaries(
    {"process": st.sampled_from(["ddpm", "dvdp", "subspace"])},
    optional={
        "turning_points": rarely(odd, st.sampled_from([[], [50], [300, 600], [1, 2, 3, 4], [999], [9999], "auto"])),
        "tolerance": rarely(odd, st.none()),
        "overrides": rarely(odd, overrides),
    },
)
keys = st.lists(st.sampled_from(SECTIONS), max_size=3, unique=True)
trees = rarely(
    odd,
    keys.flatmap(
        lambda names: st.fixed_dictionaries(
            {name: section(name) for name in names},
            optional={
                "settings": rarely(odd, st.dictionaries(st.sampled_from("abc") | scalars, setting, max_size=3)),
                "seeds": rarely(odd, st.lists(st.sampled_from(WHOLE), max_size=3)),
            },
        )
    ),
)
BEFORE = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(*arguments: str) -> str:
    """`dvdp check` ends with a result or with one sentence, which is returned, within 10 s and 1 GiB."""
    out, err = io.StringIO(), io.StringIO()
    started = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["check", *arguments])
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - BEFORE < 2**20, "in KiB"
    if status == 0:
        assert out.getvalue()
        assert not err.getvalue()
    else:
        assert status == 2
        assert not out.getvalue()
        (line,) = err.getvalue().splitlines()
        assert line.startswith("dvdp: ")
        assert line.endswith("."), line
        assert ". " not in line.replace("... ", ""), line
        assert len(line) < 2000, line
        assert not any(word in line for word in ("pydantic", "Traceback", "function-", "object at 0x")), line
    return out.getvalue() or err.getvalue()


def fuzzed(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )


@fuzzed(80)
@given(tree=trees)
def test_any_tree_is_checked_or_answered_with_one_sentence(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "tree.yaml"
    file.write_text(dump_yaml(tree), encoding="utf-8", errors="surrogatepass")
    check("--params", str(file))


PARTS = (
    "&a ", "*a", "<<: *a", "<<: {batch: 3}", "!!python/object:os.system x", "!!set {a}", "!!binary aGVs", "!x ", "? ",
    "[", "]", "{", "}", "- ", "-\n", ": ", "\n", "\t", "\r\n", "\0", "\ufeff", "\u2028", "---\n", "...\n",
    "%YAML 1.1\n---\n", "'", '"', "|\n  ", ">-\n", "#", "@", "`", "010", "0o10", "1e3", "1_000", "12:30", "yes", "off",
    "2020-01-01", "2020-13-45", "0x_", "=", ".inf", ".nan", "9" * 5000, "0x" + "f" * 5000, "k: " * 30, "[" * 50,
)  # fmt: skip


@fuzzed(80)
@given(
    edits=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 12), st.sampled_from(PARTS)), min_size=1, max_size=4)
)
def test_any_text_is_checked_or_answered_with_one_sentence(
    edits: list[tuple[int, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = (
        "dataset: &d {name: mine, resolution: 32, flip: true}\nschedule: {timesteps: 1000}\nsettings:\n"
        "  ddpm: {process: ddpm}\n  two:\n    process: dvdp\n    turning_points: [300, 600]\n"
        "    overrides: {training: {batch: 16}}\nseeds: [0, 1]\nmodel:\n  channel_mult: [1, 2]\n"
        "  attention_factors: []\ntraining: {batch: 32, learning_rate: 1e-3}\nsampling:\n  steps: 20\n  eta: 1\n"
    )
    for place, length, part in edits:
        at = place % (len(text) + 1)
        text = text[:at] + part + text[at + length :]
    file = tmp_path_factory.getbasetemp() / "text.yaml"
    file.write_bytes(text.encode())
    check("--params", str(file))


@fuzzed(60)
@given(
    path=st.lists(st.sampled_from([*DEFAULTS, *DEFAULTS["training"], "0", "1", "9" * 30, "-1", "a", "x"]), max_size=5),
    value=st.sampled_from([*PARTS, *map(str, (*WHOLE, *REAL)), "[" * 300, "{a: 1}", "[1, 2]", "null", ""]),
)
def test_any_override_is_checked_or_answered_with_one_sentence(
    path: list[str], value: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "override.yaml"
    file.write_text("training: {batch: 16}\nseeds: [0]\nsettings: {a: {process: ddpm}}\n")
    check("--params", str(file), "-S", f"{'.'.join(path)}={value}")


LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}]}}\n" for i in range(1, 18))


SETTINGS = ", ".join(f"s{i}: {{process: ddpm}}" for i in range(11))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LAUGHS, "its aliases stand for more than"),
        (MERGES, "its aliases stand for more than"),
        ("seeds: &a [*a]", "deeper in each other than 20 times"),
        ("model: &a {model_channels: *a}", "deeper in each other than 20 times"),
        ("[" * 60_000, "deeper in each other than 20 times"),
        ("- " * 30_000, "deeper in each other than 20 times"),
        ("seeds: [" + "1, " * 30_000 + "]", "has more than 65,536 characters"),
        ("#" * 10**8, "has more than 65,536 characters"),
        ("seeds: [" + "1," * 30_000 + "]", "seeds: found [1, 1, 1"),
        ("seeds: [" + "9" * 5000 + "]", "a number of 5,000 digits"),
        ("seeds: [0x" + "f" * 5000 + "]", "a number of 5,002 digits"),
        ("seeds: !!set {1, 2}", "the tag tag:yaml.org,2002:set"),
        ("dataset: {name: !!binary aGVsbG8=}", "the tag tag:yaml.org,2002:binary"),
        ("dataset: {name: 2020-01-01}", "dataset.name: found 2020-01-01, expected text"),
        ("dataset: {name: 2020-13-45}", "month must be in 1..12"),
        ("dataset: {name: 010}", "dataset.name: found 10, expected text"),
        ("dataset: {name: yes}\nseeds: [010, 8]\ntraining: {batch: 12:30}", "training.batch: found '12:30'"),
        ("dataset: {flip: yes}", "dataset.flip: found 'yes', expected true or false"),
        ("dataset: {flip: 1}", "dataset.flip: found 1, expected true or false"),
        ("training: {batch: true}", "training.batch: found True, expected a whole number"),
        ('training: {batch: "64"}', "training.batch: found '64', expected a whole number"),
        ('training: {learning_rate: "1e-3"}', "training.learning_rate: found '1e-3', expected a number"),
        ("training: {learning_rate: true}", "training.learning_rate: found True, expected a number"),
        ("seeds: [false]", "seeds.0: found False, expected a whole number"),
        ("model:\n\tdropout: 0", "'\\t' that cannot start any token in line 2"),
        ("model: {dropout: 0, dropout: 0.1}", "key 'dropout' is given twice in line 1"),
        ("{[1, 2]: 3}", "(1, 2)"),
        ("{? {a: 1} : 3}", "unhashable key"),
        ('model: {"\\e[31m": 1}', "model.'\\x1b[31m': unknown key"),
        ("dataset: {path: \"a\\0b\"}", "dataset.path: found 'a\\x00b', expected a path"),
        ('dataset: {path: "a\\x85b"}', "dataset.path: found 'a\\x85b', expected a path without control characters"),
        ('cluster: {storage: "\\ud800"}', "cluster.storage: found '\\ud800', expected a path"),
        ("dataset: {path: ''}", "dataset.path: found '', expected a path"),
        ('tracking: {experiment: " "}', "tracking.experiment: found ' ', expected a name without spaces around it"),
        ("schedule: {timesteps: 1000000000}", "schedule.timesteps: found 1000000000, expected at most 10000"),
        ("schedule: {timesteps: 1e9}", "schedule.timesteps: found 1000000000.0, expected at most 10000"),
        ("schedule: {shift: 60}", "schedule.shift: found 60, expected at most 20"),
        ("schedule: {floor: 1e-300}", "schedule.floor: found 1e-300, expected at least 1e-06"),
        ("training: {learning_rate: 1e30}", "training.learning_rate: found 1e+30, expected at most 100"),
        ("training: {batch: 1000000}\ndataset: {resolution: 256}", "training.batch: found 1000000, expected at"),
        ("training: {loader_workers: 256}\ndataset: {resolution: 1024}", "training.loader_workers: found 256,"),
        ("training: {preview_count: 10000}\ndataset: {resolution: 512}", "training.preview_count: found 10000,"),
        ("sampling: {batch: 1000000}\ndataset: {resolution: 64}", "sampling.batch: found 1000000, expected"),
        ("sampling: {count: 10000000}\ndataset: {resolution: 512}", "sampling.count: found 10000000, expected at most"),
        ("dataset: {resolution: 4096, workers: 256}", "dataset.workers: found 256, expected at most 64 at 4096 px"),
        ("model: {model_channels: 4096, channel_mult: [1, 64], attention_factors: []}", "found a network of about"),
        ("model: {model_channels: 1024, num_classes: 1000000}", "found a network of about"),
        (f"seeds: {[*range(100)]}\nsettings: {{{SETTINGS}}}", "seeds: found 100 for each of 11 settings"),
    ],
)  # fmt: skip
def test_hostile_files_are_answered_with_one_sentence(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(content)
    assert told in check("--params", str(tmp_path / "params.yaml"))


def test_the_largest_that_is_allowed_is_borne(tmp_path: Path) -> None:
    points = [1, 2, 3, 4, 5, 9000, 9100, 9500, 9999]
    names = [f"{'s' * 90}{i}" for i in range(100)]
    file = tmp_path / "params.yaml"
    file.write_text(
        dump_yaml(
            {
                "dataset": {"resolution": 4096},
                "schedule": {"timesteps": 10_000},
                "settings": {n: {"process": "dvdp", "turning_points": points} for n in names},
                "seeds": list(range(10)),
                "model": {"num_res_blocks": 32},
                "training": {"images": 10**12, "batch": 64, "preview_count": 8, "preview_steps": 10_000},
                "sampling": {"steps": 10_000, "batch": 64, "count": 20_000, "timestep_spacing": "logsnr"},
            }
        )
    )
    printed = check("--params", str(file))
    assert all(name in printed for name in names)
