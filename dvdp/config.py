"""``params.yaml`` as one validated tree of frozen dataclasses.

Each section checks itself, however it is made; :func:`read_params` also checks types and unknown keys, and answers
every mistake with one sentence. A :class:`Run` is what one setting with one seed amounts to, overrides applied.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from dvdp.data.sources import SOURCES
from dvdp.diffusion.schedule import ATTENUATIONS, Schedule
from dvdp.diffusion.solvers import SOLVERS
from dvdp.diffusion.timesteps import TIMESTEP_SPACINGS, share_steps
from dvdp.errors import UserError, did_you_mean

ProcessName = Literal["ddpm", "subspace", "dvdp"]
PredictionType = Literal["v_prediction", "epsilon", "sample"]
LevelDraw = Literal["all", "one"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Section:
    """Base of all sections: unknown keys are errors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def _at_least(self, bound: float, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= bound:  # also not a number
                raise UserError(f"{name}: found {getattr(self, name)}, expected at least {bound}")

    def _one_of(self, known: Collection[str], name: str) -> None:
        if getattr(self, name) not in known:
            found = getattr(self, name)
            raise UserError(f"{name}: found '{found}'{did_you_mean(found, known)}, expected one of {', '.join(known)}")

    def _plain_name(self, *names: str) -> None:
        for name in names:
            if not re.fullmatch("[A-Za-z0-9_-]+", getattr(self, name)):
                raise UserError(
                    f"{name}: found '{getattr(self, name)}', expected letters a to z, digits, '-' and '_' alone"
                )

    def _share(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected a number from 0 to 1")


@dataclass(frozen=True)
class DatasetParams(Section):
    """What ``dvdp prepare`` turns into LMDB."""

    name: str = "digits"
    """Names the registered models and the reports."""
    source: str = "digits"
    """One of :data:`dvdp.data.sources.SOURCES`."""
    path: Path | None = None
    """Folder or archive of the source, which says whether it needs one."""
    resolution: int = 32
    """Side of the square images, in pixels."""
    encoding: Literal["raw", "png", "jpeg"] = "raw"
    jpeg_quality: int = 95
    """Of encoding jpeg, from 1 to 100."""
    deduplicate: bool = False
    """Leave out images that equal an earlier one once they are resized."""
    shard_gib: float = 8.0
    """A file of the store that has grown to this many GiB is closed, and the next one begun."""
    workers: int = 0
    """Processes that decode, resize and encode; 0 does it in the one that reads and writes. The result is the same."""
    flip: bool = False
    """Mirror images at random when training."""
    max_skipped: float = 0.01
    """Share of unreadable images above which preparing fails."""

    def __post_init__(self) -> None:
        self._at_least(4, "resolution")
        self._at_least(0, "workers")
        self._share("max_skipped")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality: found {self.jpeg_quality}, expected a whole number from 1 to 100")
        if not 0 < self.shard_gib < math.inf:
            raise UserError(f"shard_gib: found {self.shard_gib}, expected a number of GiB above 0")
        self._plain_name("name")
        self._one_of(SOURCES, "source")
        needs = SOURCES[self.source].needs
        if needs and self.path is None:
            raise UserError(f"path: found nothing, expected {needs}")


@dataclass(frozen=True)
class ScheduleParams(Section):
    """The schedule that all settings share; see :mod:`dvdp.diffusion.schedule`."""

    timesteps: int = 1000
    base: Literal["linear", "cosine"] = "linear"
    shift: float = 0.0
    """Added to the base's log-SNR, in nats."""
    attenuation: str = "cosine"
    floor: float = 0.1

    def __post_init__(self) -> None:
        self._at_least(1, "timesteps")
        if not 0 < self.floor <= 1:
            raise UserError(f"floor: found {self.floor}, expected a number above 0 and at most 1")
        self._one_of(ATTENUATIONS, "attenuation")

    def build(self, process: ProcessName, turning_points: tuple[int, ...]) -> Schedule:
        """The schedule of a setting."""
        if process == "dvdp":
            return Schedule.dvdp(turning_points, self.timesteps, self.base, self.shift, self.attenuation, self.floor)
        if process == "subspace":
            return Schedule.subspace(turning_points, self.timesteps, self.base, self.shift)
        return Schedule.ddpm(self.timesteps, self.base, self.shift)


@dataclass(frozen=True)
class SettingParams(Section):
    """One line of the comparison."""

    name: str
    process: ProcessName
    turning_points: tuple[int, ...] | Literal["auto"] = ()
    """``"auto"``: what :mod:`pipelines.commands.plan` chooses once the data set is known."""
    tolerance: float | None = None
    """Of ``auto``: the error that turning points may add to DDPM's, see :attr:`dvdp.planning.planner.Plan.excess`."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other values for this setting alone: {section: {key: value}}, of schedule, model, training and sampling."""

    def __post_init__(self) -> None:
        self._plain_name("name")
        if self.process == "ddpm" and self.turning_points:
            found = self.turning_points if isinstance(self.turning_points, str) else list(self.turning_points)
            raise UserError(f"turning_points: found {found}, expected none for process ddpm")
        if (self.tolerance is not None) != isinstance(self.turning_points, str):
            raise UserError(
                f"tolerance: found {'nothing' if self.tolerance is None else self.tolerance}, expected a number, such"
                " as 0.01, beside 'turning_points: auto' and only there"
            )
        if self.tolerance is not None:
            self._at_least(0, "tolerance")
        for section in self.overrides:
            if section not in OVERRIDABLE:
                raise UserError(
                    f"overrides: found section '{section}'{did_you_mean(section, OVERRIDABLE)},"
                    f" expected one of {', '.join(OVERRIDABLE)}"
                )


@dataclass(frozen=True)
class ModelParams(Section):
    """The UNet of Dhariwal & Nichol (2021), and what it prediction_type."""

    prediction_type: PredictionType = "v_prediction"
    model_channels: int = 32
    """Width of the first stage; multiple of 4."""
    channel_mult: tuple[int, ...] = (1, 2, 2)
    """Width of each stage over ``model_channels``; each stage has half the resolution of the one before."""
    num_res_blocks: int = 1
    """Residual blocks a stage."""
    attention_factors: tuple[int, ...] = (4,)
    """Downsampling factors, within the network, of the stages that have self-attention."""
    num_head_channels: int = 32
    dropout: float = 0.0
    networks: Literal["shared", "per_level"] = "shared"
    """One network for all levels, or one for each, of this size each."""
    num_classes: int = 0
    """How many classes the data set has, where the network is told the class of each image; 0 tells it nothing."""

    def __post_init__(self) -> None:
        self._at_least(1, "num_res_blocks", "num_head_channels")
        self._at_least(0, "num_classes")
        self._share("dropout")
        if self.model_channels < 4 or self.model_channels % 4:
            raise UserError(f"model_channels: found {self.model_channels}, expected a multiple of 4")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise UserError(f"channel_mult: found {list(self.channel_mult)}, expected at least one, none below 1")
        factors = [2**i for i in range(len(self.channel_mult))]
        for factor in self.attention_factors:
            if factor not in factors:
                raise UserError(
                    f"attention_factors: found factor {factor}, expected only factors of this network, {factors}"
                )
        # The middle of the network, at the last factor, always has attention.
        for factor in {*self.attention_factors, factors[-1]}:
            width = self.model_channels * self.channel_mult[factors.index(factor)]
            if width % min(self.num_head_channels, width):
                raise UserError(
                    f"num_head_channels: found {self.num_head_channels}, expected a divisor of {width},"
                    f" the width at factor {factor}"
                )

    def check_resolution(self, resolution: int, levels: int) -> None:
        """Raise UserError unless this network can halve the smallest level of such images often enough."""
        halvings, smallest = len(self.channel_mult) - 1, resolution >> levels
        if resolution % 2**levels or smallest % 2**halvings:
            raise UserError(
                f"channel_mult: found {len(self.channel_mult)} stages, which halve the resolution {halvings} times, expected"
                f" few enough for level {levels} of {resolution} px images, which has {resolution / 2**levels:g} px; use fewer"
                " stages, fewer turning points or larger images"
            )


@dataclass(frozen=True)
class TrainingParams(Section):
    """How a network is trained. Progress is counted in images."""

    images: int = 100_000
    """Images that DDPM is trained on."""
    budget: Literal["flops", "images"] = "flops"
    """What settings have in common: training FLOPs (a cheaper setting sees more images), or images."""
    batch: int = 64
    """Images a step, over all ranks and accumulated parts."""
    accumulation: int = 1
    """At most the pixels of 1/accumulation of the batch, at full size, go through the network at once."""
    activation_checkpointing: bool = False
    """Activations are computed again in the backward pass: less memory, more time, the same weights."""
    compile: bool = False
    """The network by torch.compile, for each level and number of images by itself."""
    levels: LevelDraw = "all"
    """Of a step: all of them, each with its share of the batch, or one, with the whole batch."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices of the network and AdamW for the rest."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_images: int = 5_000
    cooldown: float = 0.0
    """Share of the images, the last ones, over which the learning rate falls linearly to 0."""
    clip_norm: float = 1.0
    precision: Precision = "fp32"
    ema_halflife_images: int = 20_000
    ema_ramp: float = 0.1
    """The half-life is at most this share of the images seen so far."""
    checkpoint_images: int = 20_000
    """Images between checkpoints."""
    keep_checkpoints: int = 2
    log_images: int = 3_200
    """Images between log lines."""
    preview_images: int = 50_000
    """Images between previews; 0 for none."""
    preview_count: int = 16
    preview_steps: int = 50
    loader_workers: int = 0

    def __post_init__(self) -> None:
        self._at_least(1, "images", "batch", "accumulation", "keep_checkpoints", "log_images", "checkpoint_images")
        self._at_least(1, "preview_count", "preview_steps", "ema_halflife_images")
        self._at_least(0, "weight_decay", "warmup_images", "preview_images", "loader_workers")
        self._share("cooldown")
        for name in ("learning_rate", "clip_norm", "ema_ramp"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: found {getattr(self, name)}, expected a number above 0")


@dataclass(frozen=True)
class ClusterParams(Section):
    """What a run may use. Addresses come from the environment (``RAY_ADDRESS``)."""

    num_workers: int = 1
    """Ranks of one training run, and workers that sample."""
    threads: int = 2
    """CPU threads a worker."""
    gpu: bool = False
    """One GPU for each worker."""
    max_failures: int = 2
    """Worker failures after which a run gives up."""
    storage: Path = Path("runs")
    """Checkpoints, samples and metrics of every run; all nodes of a cluster must see this folder."""

    def __post_init__(self) -> None:
        self._at_least(1, "num_workers", "threads")
        self._at_least(0, "max_failures")


@dataclass(frozen=True)
class SamplingParams(Section):
    """How images are drawn for scores and pictures; see :func:`dvdp.diffusion.sampling.sample`."""

    count: int = 512
    steps: int = 250
    solver: str = "ddpm"
    eta: float = 0.0
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    clip: bool = True
    timestep_spacing: str = "uniform"
    """Of the timesteps within a level; see :mod:`dvdp.diffusion.timesteps`."""
    share: Literal["length", "cost"] | tuple[int, ...] = "length"
    """Of the steps among levels: by their length, by what they cost, or as given, finest level first."""
    lift: Literal["noise", "data"] = "noise"
    """What a lift adds to the band that comes back: its noise alone, or with the variance of the data's band."""
    batch: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least(1, "count", "steps", "batch")
        self._share("eta")
        self._one_of(SOLVERS, "solver")
        self._one_of(TIMESTEP_SPACINGS, "timestep_spacing")

    def options(self, steps: int | None = None) -> dict[str, Any]:
        """Arguments of :func:`dvdp.diffusion.sampling.sample`, but for ``lift``, which needs to know the data.

        Args:
            steps: in place of the section's; steps given level by level are then shared by length.
        """
        names = ("solver", "eta", "variance", "clip", "timestep_spacing", "share", "seed")
        options = {"steps": self.steps, **{name: getattr(self, name) for name in names}}
        if steps is None or steps == self.steps:
            return options
        return {**options, "steps": steps, "share": self.share if isinstance(self.share, str) else "length"}


@dataclass(frozen=True)
class EvaluationParams(Section):
    """How samples are scored against the data set; see :mod:`dvdp.evaluation.scores`."""

    extractor: Literal["labels", "rotation", "inception"] = "labels"
    """A small network trained on the data set itself (its labels, or 4-way rotation), or Inception (real FID)."""
    inception_weights: Path | None = None
    """A local weights file in place of torch-fidelity's download; checked by SHA-256."""
    samples: int = 512
    """Generated images to score; at most ``sampling.count``."""
    kid_subset: int = 100
    extractor_epochs: int = 10

    def __post_init__(self) -> None:
        self._at_least(4, "samples")
        self._at_least(2, "kid_subset")
        self._at_least(1, "extractor_epochs")


@dataclass(frozen=True)
class TrackingParams(Section):
    """Names in MLflow. Its address comes from the environment (``MLFLOW_TRACKING_URI``), else a local file."""

    experiment: str = "dvdp"
    model: str = "dvdp"
    """Registered models are called ``<model>-<dataset>``."""

    def __post_init__(self) -> None:
        self._plain_name("model")


@dataclass(frozen=True)
class Params(Section):
    """The whole of ``params.yaml``, in the order of the pipeline."""

    dataset: DatasetParams = field(default_factory=DatasetParams)
    schedule: ScheduleParams = field(default_factory=ScheduleParams)
    settings: tuple[SettingParams, ...] = (SettingParams("ddpm", "ddpm"),)
    seeds: tuple[int, ...] = (0,)
    model: ModelParams = field(default_factory=ModelParams)
    training: TrainingParams = field(default_factory=TrainingParams)
    cluster: ClusterParams = field(default_factory=ClusterParams)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    evaluation: EvaluationParams = field(default_factory=EvaluationParams)
    tracking: TrackingParams = field(default_factory=TrackingParams)

    def __post_init__(self) -> None:
        names = [setting.name for setting in self.settings]
        if not names or len(set(names)) < len(names):
            raise UserError(f"settings: found the names {names}, expected at least one setting and no name twice")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: found {list(self.seeds)}, expected at least one and none twice")
        if self.evaluation.kid_subset > self.evaluation.samples:
            raise UserError(
                f"evaluation.kid_subset: found {self.evaluation.kid_subset}, expected at most evaluation.samples,"
                f" {self.evaluation.samples}"
            )

    def runs(self) -> list[Run]:
        """One run for each setting and seed, checked as a whole; none yet where the turning points are ``auto``."""
        runs = [(setting, self.run(setting, seed)) for setting in self.settings for seed in self.seeds]
        return [run for setting, run in runs if not isinstance(setting.turning_points, str)]

    def run(self, setting: SettingParams, seed: int) -> Run:
        """One setting with its overrides; turning points that are ``auto`` are left out.

        Raises:
            UserError: what the setting asks for does not fit together (turning points, resolutions, steps).
        """
        try:
            sections = {
                name: _validate(
                    type(getattr(self, name)),
                    {**dataclasses.asdict(getattr(self, name)), **setting.overrides.get(name, {})},
                    f"overrides.{name}",
                )
                for name in OVERRIDABLE
            }
            run = Run(
                setting=setting.name,
                seed=seed,
                process=setting.process,
                turning_points=() if isinstance(setting.turning_points, str) else setting.turning_points,
                resolution=self.dataset.resolution,
                reference_model=self.model,
                **sections,
            )
            if isinstance(setting.turning_points, str) and not isinstance(run.sampling.share, str):
                raise UserError(
                    f"sampling.share: found {list(run.sampling.share)} beside 'turning_points: auto', expected 'length'"
                    " or 'cost', as the number of levels is not known yet"
                )
            run.check()
            if self.evaluation.samples > run.sampling.count:
                raise UserError(
                    f"evaluation.samples: found {self.evaluation.samples}, expected at most sampling.count,"
                    f" {run.sampling.count}; draw more or score fewer"
                )
        except UserError as error:
            raise UserError(f"settings.{setting.name}.{str(error).rstrip('.')}.") from None
        return run


@dataclass(frozen=True)
class Run:
    """One setting with one seed: all of ``params.yaml`` that bears on it."""

    setting: str
    seed: int
    process: ProcessName
    turning_points: tuple[int, ...]
    resolution: int
    schedule: ScheduleParams
    model: ModelParams
    training: TrainingParams
    sampling: SamplingParams
    reference_model: ModelParams
    """The model without overrides: DDPM with it is what costs and speed-ups relate to."""

    def build_schedule(self) -> Schedule:
        """The run's tables of signal and noise."""
        return self.schedule.build(self.process, self.turning_points)

    def check(self) -> None:
        """Raise UserError for what would fail later: before any work."""
        schedule = self.build_schedule()
        if self.resolution % 2**schedule.levels:
            raise UserError(
                f"dataset.resolution: found {self.resolution}, expected a multiple of {2**schedule.levels} for"
                f" {schedule.levels} turning points"
            )
        self.model.check_resolution(self.resolution, schedule.levels)
        for section, prefix, steps in (
            ("sampling", "", self.sampling.steps),
            ("training", "preview_", self.training.preview_steps),
        ):
            try:
                share_steps(schedule, steps, self.sampling.timestep_spacing, self.sampling.options(steps)["share"])
            except UserError as error:
                raise UserError(f"{section}.{prefix}{error}") from None

    def describe(self) -> dict[str, Any]:
        """As plain JSON data; the inverse of :meth:`from_description`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_description(description: Mapping[str, Any]) -> Run:
        """A run from :meth:`describe`; raises UserError where it does not fit this version of the library."""

        def section(kind: type, values: Mapping[str, Any]) -> Any:
            try:
                return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
            except TypeError as error:
                raise UserError(f"model: its description does not fit this version of dvdp ({error}).") from None

        kinds = {
            "schedule": ScheduleParams,
            "model": ModelParams,
            "training": TrainingParams,
            "sampling": SamplingParams,
            "reference_model": ModelParams,
        }
        sections = {name: section(kind, description[name]) for name, kind in kinds.items()}
        return section(Run, {**description, **sections})


#: Sections of params.yaml that a setting may override.
OVERRIDABLE = ("schedule", "model", "training", "sampling")


def read_params(path: Path | str = "params.yaml") -> Params:
    """Read and check a params file.

    Raises:
        UserError: the file is missing, is no YAML, or something in it is wrong; the text names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"params: found no file '{path}', expected a params.yaml; give its path with --params.")
    try:
        tree = yaml.load(path.read_bytes(), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"params: '{path}' is no YAML: {' '.join(str(error).split())}.") from None
    params: Params = parse_params(tree if tree is not None else {}, str(path))
    return params


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML, where a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_params(tree: Mapping[str, Any], source: str = "params") -> Params:
    """A params tree from plain data; see :func:`read_params`."""
    try:
        params: Params = _validate(Params, tree, "")
        params.runs()
    except UserError as error:
        raise UserError(f"{source}: {str(error).rstrip('.')}.") from None
    return params


def _validate(kind: type, tree: Any, prefix: str) -> Any:
    # Only reading a file needs pydantic: the library itself also runs where it is not installed.
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(tree, Mapping):
        raise UserError(f"found {tree!r}, expected sections, like 'dataset:'")
    try:
        return TypeAdapter(kind).validate_python(dict(tree))
    except ValidationError as error:
        first, *others = error.errors()
        where = _keys(first["loc"], kind)
        key = ".".join(str(part) for part in ([prefix] if prefix else []) + where)
        found, problem = first["input"], first["type"]
        if problem in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _known_keys(kind, where[:-1])
            expected = f"one of {', '.join(known)}"
            raise UserError(f"{key}: unknown key{did_you_mean(str(where[-1]), known)}, expected {expected}") from None
        if problem == "value_error":
            raise UserError(f"{key + '.' if key else ''}{first['ctx']['error']}") from None
        if problem == "missing":
            raise UserError(f"{key}: found nothing, expected a value") from None
        if problem in ("dataclass_type", "dict_type", "model_type"):
            raise UserError(f"{key}: found {found!r}, expected keys with values") from None
        # Where several kinds of values are allowed there is an error for each.
        texts = [first["msg"], *(other["msg"] for other in others if _keys(other["loc"], kind) == where)]
        expected = " or ".join(text.removeprefix("Input should be ") for text in texts)
        raise UserError(f"{key}: found {found!r}, expected {expected}") from None


def _keys(location: tuple[int | str, ...], kind: type) -> list[int | str]:
    """The keys of the tree in where pydantic found an error: without the class, and the kinds of value it tried."""
    return [part for part in location if part != kind.__name__ and not re.match(r"(tuple|literal)\[", str(part))]


def _known_keys(kind: type, path: list[Any]) -> list[str]:
    for part in path:
        kind = typing.get_args(kind)[0] if isinstance(part, int) else typing.get_type_hints(kind)[part]
    return [entry.name for entry in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
