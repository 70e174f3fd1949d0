"""``params.yaml`` as one validated tree of frozen dataclasses.

Each section checks itself, however it is made, and answers every mistake with one sentence that names the key. The
defaults are those of the demo, ``params.yaml``. A :class:`Run` is one setting with one seed, overrides applied.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dvdp.diffusion.spans import check_steps, level_spans
from dvdp.errors import UserError, did_you_mean
from dvdp.precision import fastest_precision
from dvdp.yaml_files import parse_yaml, read_yaml

if TYPE_CHECKING:
    from dvdp.diffusion.schedule import Schedule

ProcessName = Literal["ddpm", "subspace", "dvdp"]
PredictionType = Literal["v_prediction", "epsilon", "sample"]
LevelDraw = Literal["all", "one"]
Precision = Literal["auto", "fp32", "bf16"]
Attenuation = Literal["cosine", "squared_cosine", "circular", "linear"]
SolverName = Literal["ddpm", "ddim", "dpm++2m", "sde-dpm++2m", "deis2", "deis3"]
TimestepSpacing = Literal["uniform", "quadratic", "logsnr"]


def _whole(value: Any) -> Any:
    """1e6 as a whole number, as YAML has no other way to write it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at_least(least: float) -> AfterValidator:
    """A bound of numbers of which zero and below are refused as such."""

    def check(value: float) -> float:
        if value < least:
            raise PydanticCustomError("greater_than_equal", "too small", {"ge": least})
        return value

    return AfterValidator(check)


def _local(value: Any) -> Any:
    if isinstance(value, Path | None):
        return value
    # Without control characters, line ends of other alphabets and halves of characters, which YAML cannot say.
    if isinstance(value, str) and re.fullmatch("[^\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,1000}", value):
        return os.path.expanduser(value)  # noqa: PTH111 (leaves what it cannot expand)
    raise PydanticCustomError("path_type", "no path")


def _by_name(value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise PydanticCustomError("by_name", "no mapping")
    return value


def _printable(value: str) -> str:
    if not value.isprintable() or not value or value != value.strip():
        raise PydanticCustomError("printable", "not printable")
    return value


# A boolean is no number here, text is neither, and a number is no boolean: YAML says which it is.
Flag = Annotated[bool, Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
#: A path of this machine; ``~`` is the home folder.
LocalPath = Annotated[Path, BeforeValidator(_local)]
#: Such a path, or the address of a registered model.
WeightsAddress = Annotated[str, BeforeValidator(_local)]

Name = Annotated[Text, Field(max_length=100, pattern="^[A-Za-z0-9_-]+$")]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Timesteps = Annotated[Whole, Field(ge=1, le=10_000)]
Images = Annotated[Whole, Field(ge=1, le=10**12)]
ImagesOrNone = Annotated[Whole, Field(ge=0, le=10**12)]
Batch = Annotated[Whole, Field(ge=1, le=10**6)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Processes = Annotated[Whole, Field(ge=0, le=256)]
Integers = Annotated[tuple[Annotated[Whole, Field(ge=-(10**6), le=10**6)], ...], Field(max_length=10)]
Weight = Annotated[Real, Field(ge=0, le=100)]
Multiples = Annotated[tuple[Annotated[Whole, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=10)]

# What a machine bears of products: pixels of a batch (uint8: 3 GiB) and of a picture, bytes of samples, settings with
# their seeds, and weights of a network (fp32: 8 GiB).
MOST_BATCH_PIXELS = 2**30
MOST_PICTURE_PIXELS = 2**27
MOST_SAMPLE_BYTES = 2**40
MOST_RUNS = 1000
MOST_WEIGHTS = 2**31

S = TypeVar("S")


class Section:
    """Base of all sections: frozen dataclasses with checked fields, where unknown keys are errors."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def section(cls: type[S]) -> type[S]:
    """A class as a frozen dataclass whose fields pydantic checks; a mistake is a UserError."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    checked: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config=config)
    check = checked.__init__

    def __init__(self: Any, *args: Any, **values: Any) -> None:  # noqa: N807
        try:
            check(self, *args, **values)
        except pydantic.ValidationError as error:
            raise UserError(_sentence(error, cls)) from None

    checked.__init__ = __init__
    return checked


@section
class DatasetParams(Section):
    """What ``dvdp prepare`` turns into LMDB."""

    name: Name = "digits"
    """Names the registered models and the reports."""
    source: Annotated[Text, Field(max_length=100)] = "digits"
    """One of :data:`dvdp.data.sources.SOURCES`."""
    path: LocalPath | None = None
    """Folder or archive of the source, which says whether it needs one."""
    labels: Literal["auto", "none", "folders", "file"] = "auto"
    """What says which class an image has; ``folders`` and ``file`` are for source image_folder alone."""
    resolution: Annotated[Whole, Field(ge=4, le=4096)] = 32
    """Side of the square images, in pixels."""
    encoding: Literal["raw", "png", "jpeg"] = "raw"
    jpeg_quality: Annotated[Whole, Field(ge=1, le=100)] = 95
    """Of encoding jpeg."""
    resize: Literal["area", "lanczos", "bicubic"] = "area"
    """How images are shrunk: an average over areas, or one of Pillow's filters."""
    deduplicate: Flag = False
    """Leave out images that equal an earlier one once they are resized."""
    shard_gib: Annotated[Real, Field(gt=0, le=1024), _at_least(2**-14)] = 8.0
    """A file of the store that has grown to this many GiB is closed, and the next one begun."""
    workers: Processes = 0
    """Processes that decode, resize and encode; 0 does it in the one that reads and writes. The result is the same."""
    flip: Flag = False
    """Mirror images at random when training."""
    max_skipped: Fraction = 0.01
    """Fraction of unreadable images above which preparing fails."""

    def __post_init__(self) -> None:
        from dvdp.data.sources import SOURCES

        if self.source not in SOURCES:
            hint = did_you_mean(self.source, SOURCES)
            raise UserError(f"source: found {_shown(self.source)}{hint}, expected one of {', '.join(SOURCES)}")
        if self.workers * self.resolution**2 > MOST_BATCH_PIXELS:
            most = MOST_BATCH_PIXELS // self.resolution**2
            raise UserError(f"workers: found {self.workers}, expected at most {most} at {self.resolution} px")
        needs = SOURCES[self.source].needs
        if needs and self.path is None:
            raise UserError(f"path: found nothing, expected {needs}")
        if self.labels in ("folders", "file") and self.source != "image_folder":
            raise UserError(f"labels: found '{self.labels}' beside source '{self.source}', expected auto or none")


@section
class ScheduleParams(Section):
    """The schedule that all settings share; see :mod:`dvdp.diffusion.schedule`."""

    timesteps: Timesteps = 1000
    base: Literal["linear", "cosine"] = "linear"
    shift: Annotated[Real, Field(ge=-20, le=20)] = 0.0
    """Added to the base's log-SNR, in nats."""
    attenuation: Attenuation = "cosine"
    floor: Annotated[Real, Field(gt=0, le=1), _at_least(1e-6)] = 0.1

    def build(self, process: ProcessName, turning_points: tuple[int, ...]) -> Schedule:
        """The schedule of a setting."""
        from dvdp.diffusion.schedule import Schedule

        if process == "dvdp":
            return Schedule.dvdp(turning_points, self.timesteps, self.base, self.shift, self.attenuation, self.floor)
        if process == "subspace":
            return Schedule.subspace(turning_points, self.timesteps, self.base, self.shift)
        return Schedule.ddpm(self.timesteps, self.base, self.shift)


#: Sections of params.yaml that a setting may override.
Overridable = Literal["schedule", "model", "training", "sampling"]


@section
class SettingParams(Section):
    """One line of the comparison; its name is its key in :attr:`Params.settings`."""

    process: ProcessName
    turning_points: Integers | Literal["auto"] = ()
    """``"auto"``: what :mod:`pipelines.turning_points` chooses once the data set is known."""
    tolerance: Annotated[Real | None, Field(ge=0, le=10**6)] = None
    """Of ``auto``: the error that turning points may add to DDPM's, see :attr:`dvdp.planning.planner.Plan.excess`."""
    overrides: dict[Overridable, dict[str, Any]] = Field(default_factory=dict)
    """Other values for this setting alone: {section: {key: value}}."""

    def __post_init__(self) -> None:
        if self.process == "ddpm" and self.turning_points:
            found = self.turning_points if isinstance(self.turning_points, str) else list(self.turning_points)
            raise UserError(f"turning_points: found {found}, expected none for process ddpm")
        if (self.tolerance is not None) != isinstance(self.turning_points, str):
            raise UserError(
                f"tolerance: found {'nothing' if self.tolerance is None else self.tolerance}, expected a number, such"
                " as 0.01, beside 'turning_points: auto' and only there"
            )


@section
class ModelParams(Section):
    """The UNet of Dhariwal & Nichol (2021), and what it predicts."""

    prediction_type: PredictionType = "v_prediction"
    model_channels: Annotated[Whole, Field(ge=4, le=4096, multiple_of=4)] = 16
    """Width of the first stage; multiple of 4."""
    channel_mult: Multiples = (1, 2, 4)
    """Width of each stage over ``model_channels``; each stage has half the resolution of the one before."""
    num_res_blocks: Annotated[Whole, Field(ge=1, le=32)] = 1
    """Residual blocks a stage."""
    attention_factors: Integers = (4,)
    """Downsampling factors, within the network, of the stages that have self-attention."""
    num_head_channels: Annotated[Whole, Field(ge=1, le=4096)] = 32
    dropout: Fraction = 0.0
    networks: Literal["shared", "per_level"] = "shared"
    """One network for all levels, or one for each, of this size each."""
    num_classes: Annotated[Whole, Field(ge=0, le=10**6)] = 10
    """Number of classes in the data set, for a class-conditional network; 0 for an unconditional one."""

    def __post_init__(self) -> None:
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

    def about_weights(self) -> int:
        """Number of the network's weights, within a factor of 2."""
        squares = sum((self.model_channels * multiplier) ** 2 for multiplier in self.channel_mult)
        return (45 * self.num_res_blocks + 27) * squares + 4 * self.model_channels * self.num_classes

    def check_resolution(self, resolution: int, levels: int) -> None:
        """Raise UserError unless this network can halve the smallest level of such images often enough."""
        halvings, smallest = len(self.channel_mult) - 1, resolution >> levels
        if resolution % 2**levels or smallest % 2**halvings:
            raise UserError(
                f"model.channel_mult: found {len(self.channel_mult)} stages, which halve the resolution {halvings}"
                f" times, expected few enough for level {levels} of {resolution} px images, which has"
                f" {resolution / 2**levels:g} px; use fewer stages, fewer turning points or larger images"
            )


@section
class TrainingParams(Section):
    """How a network is trained. Progress is counted in images."""

    start: WeightsAddress | None = None
    """Weights to start from, a path or ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``; random ones if None."""
    images: Images = 9_000
    """Images that DDPM is trained on."""
    budget: Literal["flops", "images"] = "flops"
    """What settings have in common: training FLOPs (a cheaper setting sees more images), or images."""
    batch: Batch = 32
    """Images a step, over all ranks and accumulated parts."""
    groups: Batch | Literal["auto"] = "auto"
    """Of the images of a step, each with the same number of images at each level. A rank takes whole groups, so that a
    run can go on with as many ranks as divide them; ``auto`` is ``cluster.num_workers``, see :meth:`Params.run`."""
    accumulation: Batch = 1
    """At most the pixels of 1/accumulation of the batch, at full size, go through the network at once."""
    batch_fit: Flag = False
    """Where memory runs out, the parts of the batch are made smaller, and the step is done again."""
    activation_checkpointing: Flag = False
    """Activations are computed again in the backward pass: less memory, more time, the same weights."""
    label_dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """Probability that an image is shown without its label, for guidance (Ho & Salimans 2022)."""
    compile: Flag = False
    """The network by torch.compile, for each level and number of images by itself."""
    span: Literal["level", "all"] = "level"
    """Timesteps that a level is trained at: its own, or all of them, so that turning points are chosen after training,
    as in subspace diffusion (Jing et al. 2022)."""
    levels: LevelDraw = "all"
    """Of a step: all of them, each with its share of the batch, or one, with the whole batch."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """AdamW, or Muon for the matrices of the network and AdamW for the rest."""
    learning_rate: Annotated[Real, Field(gt=0, le=100)] = 8e-3
    weight_decay: Annotated[Real, Field(ge=0, le=100)] = 0.0
    warmup_images: ImagesOrNone = 1_000
    cooldown: Fraction = 0.7
    """Fraction of the images, the last ones, over which the learning rate falls linearly to 0."""
    clip_norm: Annotated[Real, Field(gt=0, le=10**9)] = 1.0
    precision: Precision = "auto"
    """Of the forward and backward pass; ``auto`` is what :func:`dvdp.precision.fastest_precision` says, see
    :meth:`Params.run`."""
    ema_halflife_images: Images = 5_000
    ema_ramp: Annotated[Real, Field(gt=0, le=10**6)] = 0.1
    """The half-life is at most this share of the images seen so far."""
    checkpoint_images: Images = 12_000
    """Images between checkpoints."""
    keep_checkpoints: Annotated[Whole, Field(ge=1, le=1000)] = 2
    log_images: Images = 3_200
    """Images between log lines."""
    preview_images: ImagesOrNone = 15_000
    """Images between previews; 0 for none."""
    preview_count: Annotated[Whole, Field(ge=1, le=10_000)] = 16
    preview_steps: Timesteps = 50
    loader_workers: Processes = 0

    def groups_on(self, ranks: int) -> int:
        """Groups of a step's images, in which ``auto`` is one for each rank.

        Raises:
            UserError: the batch does not divide over them, or they not over the ranks.
        """
        groups = ranks if self.groups == "auto" else self.groups
        if groups % ranks:
            raise UserError(
                f"training.groups: found {groups}, expected a multiple of the {ranks} ranks; change it or"
                " cluster.num_workers."
            )
        if self.batch % groups:
            raise UserError(
                f"training.batch: found {self.batch}, expected a multiple of training.groups, {groups} (auto:"
                " cluster.num_workers); change one of them."
            )
        return groups


@section
class ClusterParams(Section):
    """What a run may use. Addresses come from the environment (``RAY_ADDRESS``)."""

    num_workers: Annotated[Whole, Field(ge=1, le=1024)] = 1
    """Ranks of one training run, and workers that sample."""
    threads: Annotated[Whole, Field(ge=1, le=256)] = 1
    """CPU threads a worker."""
    gpu: Flag = False
    """One GPU for each worker."""
    shard: Flag = False
    """Ranks of a training run share weights, gradients, optimiser and average between them, where a GPU cannot hold
    them all; see :mod:`dvdp.training.ranks`."""
    busy: Literal["wait", "leave", "share"] = "wait"
    """What a run does while another one uses the cores of this machine; nothing on a cluster of ``RAY_ADDRESS``."""
    max_failures: Annotated[Whole, Field(ge=0, le=100)] = 2
    """Worker failures after which a run gives up."""
    storage: LocalPath = Path("runs")
    """Checkpoints, samples and metrics of every run; all nodes of a cluster must see this folder."""


@section
class SamplingParams(Section):
    """How images are drawn for scores and pictures; see :func:`dvdp.diffusion.sampling.sample`."""

    count: Annotated[Whole, Field(ge=1, le=10**7)] = 256
    steps: Timesteps = 50
    solver: SolverName = "ddpm"
    eta: Fraction = 0.0
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    clip: Flag = True
    timestep_spacing: TimestepSpacing = "uniform"
    """Of the timesteps within a level; see :mod:`dvdp.diffusion.timesteps`."""
    share: Integers | Literal["length", "cost"] = "length"
    """Of the steps among levels: by their length, by what they cost, or as given, finest level first."""
    lift: Literal["noise", "data"] = "noise"
    """What a lift adds to the band that comes back: its noise alone, or with the variance of the data's band."""
    guidance_scale: Weight | Annotated[tuple[Weight, ...], Field(min_length=1, max_length=11)] = 1.0
    """Of classifier-free guidance, at all levels or at each, finest first; 1 is none; see
    :mod:`dvdp.diffusion.guidance`."""
    guidance_rescale: Fraction = 0.0
    thresholding: Annotated[Real, Field(ge=0.5, le=1)] | None = None
    """Quantile of the pixels of a predicted clean image that dynamic thresholding scales into the pixel range."""
    batch: Batch = 64
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.thresholding is not None and not self.clip:
            raise UserError(
                f"thresholding: found {self.thresholding} beside 'clip: false', expected 'clip: true', which it"
                " refines; change one of them"
            )

    def guidance(self, level: int) -> float:
        """The guidance scale of a level; beyond a list's end that of its coarsest level."""
        scales = self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)
        return scales[min(level, len(scales) - 1)]

    @property
    def guided(self) -> bool:
        """Whether any level is guided."""
        return self.guidance_scale != 1 if isinstance(self.guidance_scale, float) else set(self.guidance_scale) != {1.0}

    @property
    def off(self) -> set[str]:
        """Keys of later releases that are off: they are in no hash and no record."""
        keys = set() if self.guided else {"guidance_scale", "guidance_rescale"}
        return keys | ({"thresholding"} if self.thresholding is None else set())

    def options(self, steps: int | None = None) -> dict[str, Any]:
        """Arguments of :func:`dvdp.diffusion.sampling.sample`, but for ``lift``, which needs to know the data.

        Args:
            steps: in place of the section's; steps given level by level are then shared by length.
        """
        names = ("solver", "eta", "variance", "clip", "timestep_spacing", "share", "seed")
        options = {"steps": self.steps, **{name: getattr(self, name) for name in names}}
        later = ("guidance_scale", "guidance_rescale", "thresholding")
        options |= {name: getattr(self, name) for name in later if name not in self.off}
        if steps is None or steps == self.steps:
            return options
        return {**options, "steps": steps, "share": self.share if isinstance(self.share, str) else "length"}


@section
class EvaluationParams(Section):
    """How samples are scored against the data set; see :mod:`dvdp.evaluation.scores`."""

    extractor: Literal["labels", "rotation", "inception"] = "labels"
    """A small network trained on the data set itself (its labels, or 4-way rotation), or Inception (real FID)."""
    inception_weights: LocalPath | None = None
    """A local weights file in place of torch-fidelity's download; checked by SHA-256."""
    samples: Annotated[Whole, Field(ge=4, le=200_000)] = 256
    """Generated images to score; at most ``sampling.count``."""
    kid_subset: Annotated[Whole, Field(ge=2, le=10_000)] = 100
    extractor_epochs: Annotated[Whole, Field(ge=1, le=1000)] = 10
    likelihood: Annotated[Whole, Field(ge=0, le=10_000)] = 0
    """Real images to bound the likelihood of; 0 for none. See :mod:`dvdp.evaluation.likelihood`."""

    def __post_init__(self) -> None:
        if self.likelihood == 1:
            raise UserError("likelihood: found 1, expected 0 (none) or at least 2 images, for the standard error")


@section
class TrackingParams(Section):
    """Names in MLflow. Its address comes from the environment (``MLFLOW_TRACKING_URI``), else a local file."""

    experiment: Annotated[Text, Field(max_length=100), AfterValidator(_printable)] = "dvdp"
    model: Name = "dvdp"
    """Registered models are called ``<model>-<dataset>``."""
    max_score: Annotated[Real, Field(gt=0, le=10**9)] | None = None
    """A version with a higher score never becomes champion by itself."""


@section
class Params(Section):
    """The whole of ``params.yaml``, in the order of the pipeline."""

    dataset: DatasetParams = Field(default_factory=DatasetParams)
    schedule: ScheduleParams = ScheduleParams()
    settings: Annotated[dict[Name, SettingParams], BeforeValidator(_by_name), Field(min_length=1, max_length=100)] = (
        Field(
            default_factory=lambda: {
                "ddpm": SettingParams("ddpm"),
                "dvdp-600": SettingParams("dvdp", (600,)),
                "dvdp-300-600": SettingParams("dvdp", (300, 600)),
            }
        )
    )
    """By name, in the order of tables."""
    seeds: Annotated[tuple[Seed, ...], Field(max_length=1000)] = (0,)
    model: ModelParams = ModelParams()
    training: TrainingParams = TrainingParams()
    cluster: ClusterParams = ClusterParams()
    sampling: SamplingParams = SamplingParams()
    evaluation: EvaluationParams = EvaluationParams()
    tracking: TrackingParams = TrackingParams()

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: found {list(self.seeds)}, expected at least one and none twice")
        if len(self.settings) * len(self.seeds) > MOST_RUNS:
            raise UserError(
                f"seeds: found {len(self.seeds)} for each of {len(self.settings)} settings, expected at most"
                f" {MOST_RUNS:,} runs in all"
            )
        if self.evaluation.kid_subset > self.evaluation.samples:
            raise UserError(
                f"evaluation.kid_subset: found {self.evaluation.kid_subset}, expected at most evaluation.samples,"
                f" {self.evaluation.samples}"
            )

    def describe(self) -> dict[str, Any]:
        """As plain JSON data, every key said; :func:`parse_params` reads it."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def runs(self) -> list[Run]:
        """One run for each setting and seed, checked as a whole; none yet where the turning points are ``auto``."""
        runs = [self.run(name, self.seeds[0]) for name in self.settings]
        return [
            dataclasses.replace(run, seed=seed)
            for run in runs
            if not isinstance(self.settings[run.setting].turning_points, str)
            for seed in self.seeds
        ]

    def run(self, name: str, seed: int) -> Run:
        """The setting of a name with its overrides; turning points that are ``auto`` are left out.

        A precision that is ``auto`` becomes that of this machine, or of GPUs if ``cluster.gpu``, and groups that are
        become ``cluster.num_workers``: the run records them.

        Raises:
            UserError: what the setting asks for does not fit together (turning points, resolutions, steps).
        """
        try:
            return self._run(name, seed)
        except UserError as error:
            key, _, rest = str(error).rstrip(".").partition(": ")
            section, _, last = key.partition(".")
            if section == "turning_points":
                key = f"settings.{name}.{key}"
            elif last in self.settings[name].overrides.get(typing.cast(Overridable, section), ()):
                key = f"settings.{name}.overrides.{key}"
            raise UserError(f"{key}: {rest}, in setting '{name}'.") from None

    def without_auto(self, training: TrainingParams) -> TrainingParams:
        """With what is ``auto`` of it as it is on this cluster; see :meth:`run`."""
        precision = fastest_precision(self.cluster.gpu) if training.precision == "auto" else training.precision
        groups = self.cluster.num_workers if training.groups == "auto" else training.groups
        return dataclasses.replace(training, precision=precision, groups=groups)

    def _run(self, name: str, seed: int) -> Run:
        setting, sections = self.settings[name], {}
        for section in typing.get_args(Overridable):
            values = {**dataclasses.asdict(getattr(self, section)), **setting.overrides.get(section, {})}
            try:
                sections[section] = type(getattr(self, section))(**values)
            except UserError as error:
                raise UserError(f"{section}.{error}") from None
        sections["training"] = self.without_auto(sections["training"])
        points = () if isinstance(setting.turning_points, str) else setting.turning_points
        run = Run(name, seed, setting.process, points, self.dataset.resolution, **sections, reference_model=self.model)
        if isinstance(setting.turning_points, str) and not isinstance(run.sampling.share, str):
            raise UserError(
                f"sampling.share: found {list(run.sampling.share)} beside 'turning_points: auto', expected 'length'"
                " or 'cost', as the number of levels is not known yet"
            )
        if isinstance(setting.turning_points, str) and not isinstance(run.sampling.guidance_scale, float):
            raise UserError(
                f"sampling.guidance_scale: found {list(run.sampling.guidance_scale)} beside 'turning_points: auto',"
                " expected a number, as the number of levels is not known yet"
            )
        run.check()
        if self.evaluation.samples > run.sampling.count:
            raise UserError(
                f"evaluation.samples: found {self.evaluation.samples}, expected at most sampling.count,"
                f" {run.sampling.count}; draw more or score fewer"
            )
        if self.evaluation.likelihood and run.schedule.timesteps < 2:
            raise UserError(
                f"evaluation.likelihood: found {self.evaluation.likelihood} beside schedule.timesteps 1, expected 0, or"
                " at least 2 timesteps"
            )
        return run


@section
class Start(Section):
    """What ``training.start`` was when the run was named; see :mod:`dvdp.training.start`."""

    sha256: str
    """Of the file."""
    setting: str
    training: str
    """Training hash; empty for weights that are not ours."""
    images: int | None
    """That the weights had seen, over all trainings one after the other; None where nobody knows."""
    flops: float | None
    """Of these trainings."""

    @property
    def seen(self) -> str:
        """What the weights had seen, for people."""
        if self.images is None or self.flops is None:
            return "an unknown number of images"
        return f"{self.images:,} images, {self.flops:.2e} FLOPs"


@section
class Run(Section):
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
    start: Start | None = None
    """Of ``training.start``, once :func:`dvdp.training.start.with_start` has found it."""

    def __post_init__(self) -> None:
        if self.training.precision == "auto":
            raise UserError("training.precision: found 'auto' in a run, expected fp32 or bf16, as Params.run chooses")

    @property
    def at_all_timesteps(self) -> bool:
        """Whether its levels are trained at all timesteps: one training then serves all turning points, if as many."""
        return self.training.span == "all" and bool(self.turning_points)

    def build_schedule(self) -> Schedule:
        """The run's tables of signal and noise."""
        return self.schedule.build(self.process, self.turning_points)

    def check_start(self) -> None:
        """Raise UserError where ``training.start`` was not looked at, so that nobody knows what it holds."""
        if self.training.start is not None and self.start is None:
            raise UserError(
                f"training.start: found '{self.training.start}' in a run that does not know what it holds, expected one"
                " that dvdp.training.start.with_start has returned; call it first."
            )

    def check(self) -> None:
        """Raise UserError for what would fail later, or be more than a machine bears: before any work."""
        spans = level_spans(self.turning_points, self.schedule.timesteps)
        levels = len(self.turning_points)
        if self.resolution % 2**levels:
            raise UserError(
                f"dataset.resolution: found {self.resolution}, expected a multiple of {2**levels} for"
                f" {levels} turning points"
            )
        self.model.check_resolution(self.resolution, levels)
        if self.process == "dvdp" and self.training.span == "all":
            raise UserError(
                "training.span: found 'all' for process dvdp, whose attenuation depends on the turning points, expected"
                " 'level'; change one of them (subspace diffusion can be trained at all timesteps)"
            )
        for prefix, steps in (("sampling.", self.sampling.steps), ("training.preview_", self.training.preview_steps)):
            try:
                check_steps(spans, steps, self.sampling.options(steps)["share"])
            except UserError as error:
                raise UserError(f"{prefix}{error}") from None
        if self.training.label_dropout and not self.model.num_classes:
            raise UserError(
                f"training.label_dropout: found {self.training.label_dropout} for an unconditional network"
                " (model.num_classes is 0), expected 0; set one of them"
            )
        self.check_guidance(self.sampling, "sampling.")
        for key, found, images, most in (
            ("training.batch", self.training.batch, 1, MOST_BATCH_PIXELS),
            ("training.loader_workers", self.training.loader_workers, self.training.batch, MOST_BATCH_PIXELS),
            ("training.preview_count", self.training.preview_count, 1, MOST_PICTURE_PIXELS),
            ("sampling.batch", self.sampling.batch, 1, MOST_BATCH_PIXELS),
            ("sampling.count", self.sampling.count, 1, MOST_SAMPLE_BYTES // 3),
        ):
            allowed = most // (images * self.resolution**2)
            if found > allowed:
                each = "" if images == 1 else f" and {images} images each"
                raise UserError(f"{key}: found {found}, expected at most {allowed:,} at {self.resolution} px{each}")
        weights = self.model.about_weights() * (levels + 1 if self.model.networks == "per_level" else 1)
        if weights > MOST_WEIGHTS:
            raise UserError(
                f"model.model_channels: found a network of about {weights:.1e} weights, expected at most"
                f" {MOST_WEIGHTS:.1e}; make it narrower, with fewer blocks or fewer classes"
            )

    def check_guidance(self, sampling: SamplingParams, prefix: str = "") -> None:
        """Raise UserError for a guidance scale that does not fit the levels, or what the network was trained for."""
        found, levels = sampling.guidance_scale, len(self.turning_points) + 1
        if isinstance(found, tuple) and len(found) != levels:
            raise UserError(
                f"{prefix}guidance_scale: found {len(found)} numbers, {list(found)}, expected one for each of"
                f" {levels} levels, finest first, or one number for all."
            )
        if sampling.guided and not (self.model.num_classes and self.training.label_dropout):
            shown = list(found) if isinstance(found, tuple) else found
            known = self.model.num_classes > 0
            why = "trained without label_dropout" if known else "unconditional (model.num_classes is 0)"
            raise UserError(
                f"{prefix}guidance_scale: found {shown} for a network that is {why}, expected 1, which is no guidance;"
                " leave it out, or train with classes and a label_dropout such as 0.1."
            )

    def describe(self) -> dict[str, Any]:
        """As plain JSON data; the inverse of :meth:`from_description`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_description(description: Mapping[str, Any]) -> Run:
        """A run from :meth:`describe`; raises UserError where it does not fit this version of the library."""
        try:
            return _build(Run, description)
        except UserError as error:
            raise UserError(f"model: its description does not fit this version of dvdp ({error}).") from None


def read_params(path: Path | str = "params.yaml", overrides: Mapping[str, Any] | None = None) -> Params:
    """Read and check a params file.

    Args:
        overrides: other values by key, such as ``{"training.batch": 64}``; see :func:`parse_overrides`.

    Raises:
        UserError: the file is missing, is no YAML, or something in it is wrong; the text names the key.
    """
    tree = _read_tree(Path(path))
    for key, value in (overrides or {}).items():
        tree = _override(tree, key, value)
    said = (value if isinstance(value, str) else json.dumps(value, default=str) for value in (overrides or {}).values())
    texts = (f"-S {_short(f'{key}={value}')}" for key, value in zip(overrides or {}, said, strict=True))
    return parse_params(tree, " ".join([str(path), *texts]))


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Overrides by key from those of a command line, each such as ``settings.dvdp-600.turning_points=[500]``.

    Raises:
        UserError: one is not of that form, or its value is no YAML.
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"-S: found '{_short(text)}', expected KEY=VALUE, such as training.batch=64.")
        # The last of several counts, and comes last.
        overrides.pop(key, None)
        try:
            overrides[key] = parse_yaml(value)
        except UserError:
            raise UserError(
                f"-S {_short(key)}: found '{_short(value)}', expected YAML, such as 64, linear or [300, 600]."
            ) from None
    return overrides


def check_says_every_key(path: Path | str = "params.yaml") -> None:
    """Raise UserError for a key that a params file leaves to its default, whose change DVC would not see."""
    tree = _read_tree(Path(path))
    for name, default in Params().describe().items():
        keys = default if isinstance(default, dict) and name != "settings" else ()
        said = tree.get(name, ())
        missing = [f"{name}.{key}" for key in keys if key not in said] if name in tree else [name]
        if missing:
            raise UserError(
                f"{path}: {missing[0]}: found nothing, expected a value for every key, as DVC knows no defaults; write"
                f" them with `dvdp params --params {path} --out {path}`."
            )


def _read_tree(path: Path) -> Any:
    """The tree of a params file as it stands; an empty file is an empty one."""
    missing = UserError(f"params: found no file '{path}', expected a params.yaml; give its path with --params.")
    try:
        if not path.is_file():
            raise missing
        tree = read_yaml(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise missing from None
        raise UserError(f"params: cannot read '{path}' ({error.strerror}), expected a params.yaml.") from None
    except UserError as error:
        raise error if error is missing else UserError(f"params: {str(error).rstrip('.')}.") from None
    return {} if tree is None else tree


def parse_params(tree: Mapping[str, Any], source: str = "params") -> Params:
    """A params tree from plain data; see :func:`read_params`."""
    try:
        params = _build(Params, tree)
        params.runs()
    except UserError as error:
        raise UserError(f"{source}: {str(error).rstrip('.')}.") from None
    return params


def _override(tree: Any, key: str, value: Any) -> Any:
    key = _short(key)
    path, default = key.split("."), Params().describe()
    # A name belongs to the settings of the file, or to the default ones where it has none.
    settings = default.pop("settings")
    if path[0] == "settings" and isinstance(tree, Mapping | None):
        tree = {"settings": settings, **(tree or {})}
    try:
        if len(path) > 2 and path[0] == "settings" and isinstance(tree, Mapping):
            names = [str(name) for name in tree["settings"]] if isinstance(tree["settings"], Mapping) else [path[1]]
            if path[1] not in names:
                hint = did_you_mean(path[1], names)
                raise UserError(f"found no setting '{path[1]}'{hint}, expected one of {_short(', '.join(names))}")
        return _replaced(tree, default, path, value)
    except UserError as error:
        raise UserError(f"-S {key}: {error}.") from None


def _replaced(tree: Any, default: Any, path: Sequence[str], value: Any) -> Any:
    """A tree with another value at a path. A list that the tree leaves out is the default one."""
    if not path:
        return value
    key, *rest = path
    if isinstance(tree, list):
        if not key.isdecimal() or int(key) >= len(tree):
            raise UserError(f"found position '{key}', expected a number below {len(tree)}, the length of the list")
        changed = _replaced(tree[int(key)], None, rest, value)
        return [*tree[: int(key)], changed, *tree[int(key) + 1 :]]
    if not isinstance(tree, Mapping | None):
        raise UserError(f"found '{key}' below the value {_shown(tree)}, expected a key that has keys below it")
    default = default.get(key) if isinstance(default, Mapping) else None
    old = (tree or {}).get(key, default if isinstance(default, list) else None)
    return {**(tree or {}), key: _replaced(old, default, rest, value)}


def _build(kind: type[S], tree: Any) -> S:
    if not isinstance(tree, Mapping):
        raise UserError(f"found {_shown(tree)}, expected sections, like 'dataset:'")
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(tree))
    except pydantic.ValidationError as error:
        raise UserError(_sentence(error, kind)) from None


#: What is expected where pydantic finds such an error, in words.
EXPECTED = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "a number above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "a number below {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "letters a to z, digits, '-' and '_' alone",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text, in quotes where it looks like a number",
    "path_type": "a path without control characters, in quotes where it looks like a number",
    "invalid_key": "a word",
    "dataclass_type": "keys with values",
    "dict_type": "keys with values",
    "by_name": "a mapping by name, each as 'dvdp-600: {{process: dvdp, turning_points: [600]}}'",
    "bool_type": "true or false",
    "printable": "a name without spaces around it and without characters that cannot be printed",
    "missing": "a value",
}


def _sentence(error: pydantic.ValidationError, kind: type) -> str:
    """What is wrong first, without a full stop: key, found, expected."""
    first, *others = error.errors()
    where, problem = _keys(first["loc"]), first["type"]
    key = ".".join(str(part) if re.fullmatch(r"[\w-]{1,60}", str(part)) else _shown(part) for part in where)
    if problem == "value_error":
        return f"{key + '.' if key else ''}{str(first['ctx']['error']).rstrip('.')}"
    if problem in ("unexpected_keyword_argument", "extra_forbidden") or (
        first["loc"][-1] == "[key]" and problem == "literal_error"
    ):
        known = _known_keys(kind, where[:-1])
        return f"{key}: unknown key{did_you_mean(_short(str(where[-1])), known)}, expected one of {', '.join(known)}"
    # Where several kinds of values are allowed there is an error for each.
    alike = [first, *(other for other in others if _keys(other["loc"]) == where)]
    texts = (EXPECTED.get(e["type"], e["msg"].removeprefix("Input should be ")) for e in alike)
    bounds = ({k: f"{v:g}" if isinstance(v, float) else v for k, v in e.get("ctx", {}).items()} for e in alike)
    expected = " or ".join(text.format(**values) for text, values in zip(texts, bounds, strict=True))
    hint = did_you_mean(first["input"], re.findall("'(.*?)'", expected)) if isinstance(first["input"], str) else ""
    return f"{key}: found {'nothing' if problem == 'missing' else _shown(first['input'])}{hint}, expected {expected}"


def _shown(value: Any) -> str:
    return _short(str(value) if isinstance(value, datetime.date) else repr(value))


def _short(text: str) -> str:
    """In one line."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:100]}..."


def _keys(location: tuple[int | str, ...]) -> list[int | str]:
    """The keys of the tree in where pydantic found an error: without the kinds of value that it tried."""
    return [part for part in location if not re.match(r"tuple\[|literal\[|function-|constrained-|\[key\]", str(part))]


def _known_keys(kind: Any, path: Collection[Any]) -> list[str]:
    for part in path:
        kind = typing.get_type_hints(kind)[part] if dataclasses.is_dataclass(kind) else typing.get_args(kind)[-1]
    if dataclasses.is_dataclass(kind):
        return [entry.name for entry in dataclasses.fields(kind)]
    return list(typing.get_args(typing.get_args(kind)[0]))
