"""Weights of other libraries: the outputs of their architectures, written here by the names of their weights."""

from __future__ import annotations

import functools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dvdp.errors import UserError
from dvdp.models.diffusers_unet import read_folder
from dvdp.models.export import load_model
from dvdp.models.foreign import import_unet
from dvdp.models.guided_diffusion import read_checkpoint
from dvdp.training.start import with_start
from tests.training.test_start import make

State = dict[str, Tensor]
WIDTH, SIZE = 128, 8
#: Of a small network of guided-diffusion, in its words.
ARGUMENTS: dict[str, Any] = {
    "image_size": SIZE,
    "num_channels": WIDTH,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "16,4",
    "num_head_channels": 64,
    "resblock_updown": True,
    "learn_sigma": True,
}


class Maker:
    """Random weights by name, about as large as trained ones."""

    def __init__(self) -> None:
        self.state: State = {}
        self._random = torch.Generator().manual_seed(0)

    def __call__(self, name: str, *shape: int) -> None:
        fan = math.prod(shape[1:])
        self.state[f"{name}.weight"] = torch.randn(shape, generator=self._random) / math.sqrt(fan)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=self._random)

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=self._random)
        self.state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=self._random)


@functools.cache
def guided_state(classes: int = 0) -> State:
    """A state dict of guided-diffusion's UNetModel by :data:`ARGUMENTS`: names and shapes of its checkpoints."""
    put, embedding = Maker(), 4 * WIDTH

    def block(name: str, inputs: int, outputs: int) -> None:
        put.norm(f"{name}.in_layers.0", inputs)
        put(f"{name}.in_layers.2", outputs, inputs, 3, 3)
        put(f"{name}.emb_layers.1", 2 * outputs, embedding)
        put.norm(f"{name}.out_layers.0", outputs)
        put(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            put(f"{name}.skip_connection", outputs, inputs, 1, 1)

    def attention(name: str, width: int) -> None:
        put.norm(f"{name}.norm", width)
        put(f"{name}.qkv", 3 * width, width, 1)
        put(f"{name}.proj_out", width, width, 1)

    put("time_embed.0", embedding, WIDTH)
    put("time_embed.2", embedding, embedding)
    if classes:
        put.state["label_emb.weight"] = torch.randn(classes, embedding, generator=torch.Generator().manual_seed(1))
    put("input_blocks.0.0", WIDTH, 3, 3, 3)
    block("input_blocks.1.0", WIDTH, WIDTH)
    block("input_blocks.2.0", WIDTH, WIDTH)
    block("input_blocks.3.0", WIDTH, 2 * WIDTH)
    attention("input_blocks.3.1", 2 * WIDTH)
    for i in (0, 2):
        block(f"middle_block.{i}", 2 * WIDTH, 2 * WIDTH)
    attention("middle_block.1", 2 * WIDTH)
    block("output_blocks.0.0", 4 * WIDTH, 2 * WIDTH)
    attention("output_blocks.0.1", 2 * WIDTH)
    block("output_blocks.1.0", 3 * WIDTH, 2 * WIDTH)
    attention("output_blocks.1.1", 2 * WIDTH)
    block("output_blocks.1.2", 2 * WIDTH, 2 * WIDTH)
    block("output_blocks.2.0", 3 * WIDTH, WIDTH)
    block("output_blocks.3.0", 2 * WIDTH, WIDTH)
    put.norm("out.0", WIDTH)
    put("out.2", 6, WIDTH, 3, 3)
    return put.state


def guided_forward(w: State, x: Tensor, t: Tensor, y: Tensor | None, new_order: bool, heads: dict[int, int]) -> Tensor:
    """What guided-diffusion's UNetModel says, from its published architecture; t from 0."""

    def layer(name: str, h: Tensor) -> Tensor:
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return (
            F.linear(h, weight, bias) if weight.dim() == 2 else F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)
        )

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"])

    def block(name: str, h: Tensor, resample: str = "") -> Tensor:
        inner = F.silu(norm(f"{name}.in_layers.0", h))
        if resample == "down":
            inner, h = F.avg_pool2d(inner, 2), F.avg_pool2d(h, 2)
        if resample == "up":
            inner, h = (F.interpolate(each, scale_factor=2, mode="nearest") for each in (inner, h))
        inner = layer(f"{name}.in_layers.2", inner)
        scale, shift = layer(f"{name}.emb_layers.1", F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        inner = layer(f"{name}.out_layers.3", F.silu(inner))
        return inner + (layer(f"{name}.skip_connection", h) if f"{name}.skip_connection.weight" in w else h)

    def attention(name: str, h: Tensor) -> Tensor:
        b, c, *side = h.shape
        n = heads[c]
        qkv = F.conv1d(norm(f"{name}.norm", h).flatten(2), w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
        if new_order:
            q, k, v = (part.reshape(b * n, c // n, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(b * n, 3 * c // n, -1).split(c // n, dim=1)
        weights = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(c // n)).softmax(dim=-1)
        out = torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, -1)
        out = F.conv1d(out, w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"])
        return h + out.reshape(b, c, *side)

    frequencies = torch.exp(-math.log(10_000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    angles = t[:, None].float() * frequencies
    embedding = layer("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    embedding = layer("time_embed.2", F.silu(embedding))
    if y is not None:
        embedding = embedding + w["label_emb.weight"][y]
    skips = [h := layer("input_blocks.0.0", x)]
    skips.append(h := block("input_blocks.1.0", h))
    skips.append(h := block("input_blocks.2.0", h, "down"))
    skips.append(h := attention("input_blocks.3.1", block("input_blocks.3.0", h)))
    h = block("middle_block.2", attention("middle_block.1", block("middle_block.0", h)))
    h = attention("output_blocks.0.1", block("output_blocks.0.0", torch.cat([h, skips.pop()], dim=1)))
    h = attention("output_blocks.1.1", block("output_blocks.1.0", torch.cat([h, skips.pop()], dim=1)))
    h = block("output_blocks.1.2", h, "up")
    h = block("output_blocks.2.0", torch.cat([h, skips.pop()], dim=1))
    h = block("output_blocks.3.0", torch.cat([h, skips.pop()], dim=1))
    return layer("out.2", F.silu(norm("out.0", h)))


TIMES = torch.tensor([0, 1, 17, 250, 998, 999])


def states() -> Tensor:
    return torch.randn(len(TIMES), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def ours(path: Path, labels: Tensor | None = None) -> Tensor:
    """What the imported network says at the same noise levels, which we count from 1."""
    with torch.no_grad():
        return load_model(path).denoiser.network(states(), TIMES + 1, 0, labels)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [({}, 4), ({"use_new_attention_order": True}, 4), ({"num_head_channels": -1, "num_heads": 2}, 2)],
    ids=["legacy", "new order", "num_heads"],
)
def test_a_guided_diffusion_checkpoint_says_the_same(tmp_path: Path, changes: dict[str, Any], heads: int) -> None:
    state, new = guided_state(), bool(changes.get("use_new_attention_order"))
    torch.save(state, tmp_path / "model.pt")
    out = tmp_path / "weights.safetensors"
    run = import_unet(read_checkpoint(tmp_path / "model.pt", {**ARGUMENTS, **changes}), out, "model.pt")
    expected = guided_forward(state, states(), TIMES, None, new, {2 * WIDTH: heads})
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours(out), expected[:, :3], rtol=0, atol=1e-5)
    assert (run.process, run.model.prediction_type, run.resolution) == ("ddpm", "epsilon", SIZE)
    assert load_model(out).sample(2, steps=3).shape == (2, 3, SIZE, SIZE)


def test_classes_are_theirs_and_none_for_images_without_a_label(tmp_path: Path) -> None:
    state, y = guided_state(classes=5), torch.tensor([0, 1, 2, 3, 4, 0])
    save_file(state, tmp_path / "model.safetensors")
    out = tmp_path / "weights.safetensors"
    run = import_unet(read_checkpoint(tmp_path / "model.safetensors", {**ARGUMENTS, "class_cond": True}), out, "model")
    assert run.model.num_classes == 5
    expected = guided_forward(state, states(), TIMES, y, new_order=False, heads={2 * WIDTH: 4})
    torch.testing.assert_close(ours(out, y), expected[:, :3], rtol=0, atol=1e-5)
    assert ours(out, torch.full((6,), -1)).isfinite().all()
    assert load_model(out).sample(1, steps=2, label="3").shape == (1, 3, SIZE, SIZE)


#: guided-diffusion's names of layers and parts -> diffusers'.
LAYERS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.2.0": "down_blocks.0.downsamplers.0", "input_blocks.3.0": "down_blocks.1.resnets.0",
    "input_blocks.3.1": "down_blocks.1.attentions.0", "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0", "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1", "output_blocks.1.1": "up_blocks.0.attentions.1",
    "output_blocks.1.2": "up_blocks.0.upsamplers.0", "output_blocks.2.0": "up_blocks.1.resnets.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
PARTS = {
    "": "", ".in_layers.0": ".norm1", ".in_layers.2": ".conv1", ".emb_layers.1": ".time_emb_proj",
    ".out_layers.0": ".norm2", ".out_layers.3": ".conv2", ".skip_connection": ".conv_shortcut",
    ".norm": ".group_norm", ".proj_out": ".to_out.0",
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": SIZE,
    "block_out_channels": [WIDTH, 2 * WIDTH],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
}


def diffusers_folder(folder: Path, state: State, **config: Any) -> Path:
    """The same network as diffusers keeps it."""
    found = {}
    for name, tensor in state.items():
        whole, kind = name.rsplit(".", 1)
        layer = next(layer for layer in LAYERS if whole == layer or whole.startswith(f"{layer}."))
        part = whole.removeprefix(layer)
        if part == ".qkv":
            for to, each in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                found[f"{LAYERS[layer]}.{to}.{kind}"] = (each.flatten(1) if kind == "weight" else each).contiguous()
        else:
            tensor = tensor.flatten(1) if part == ".proj_out" and kind == "weight" else tensor
            found[f"{LAYERS[layer]}{PARTS[part]}.{kind}"] = tensor[:3].contiguous() if layer == "out.2" else tensor
    if not config.get("flip_sin_to_cos", True):
        weight = found["time_embedding.linear_1.weight"]
        found["time_embedding.linear_1.weight"] = weight.roll(WIDTH // 2, dims=1)
    folder.mkdir()
    save_file(found, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@pytest.mark.parametrize("config", [{}, {"flip_sin_to_cos": False}], ids=str)
def test_a_folder_of_diffusers_says_the_same(tmp_path: Path, config: dict[str, Any]) -> None:
    state = guided_state()
    folder = diffusers_folder(tmp_path / "unet", state, **config)
    run = import_unet(read_folder(folder, {"base": "cosine"}), tmp_path / "weights.safetensors", "unet")
    expected = guided_forward(state, states(), TIMES, None, new_order=True, heads={2 * WIDTH: 4})
    torch.testing.assert_close(ours(tmp_path / "weights.safetensors"), expected[:, :3], rtol=0, atol=1e-5)
    assert (run.schedule.base, run.schedule.timesteps) == ("cosine", 1000)


def test_diffusers_itself_says_the_same(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = diffusers_folder(tmp_path / "unet", guided_state())
    theirs = diffusers.UNet2DModel.from_pretrained(folder).eval()
    import_unet(read_folder(folder, {}), tmp_path / "weights.safetensors", "unet")
    with torch.no_grad():
        expected = theirs(states(), TIMES).sample
    torch.testing.assert_close(ours(tmp_path / "weights.safetensors"), expected, rtol=0, atol=1e-5)


def test_imported_weights_are_a_start_that_had_seen_nobody_knows_what(tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    torch.save(guided_state(), tmp_path / "model.pt")
    import_unet(read_checkpoint(tmp_path / "model.pt", ARGUMENTS), out, "model.pt")
    size = {"prediction_type": "epsilon", "model_channels": WIDTH, "channel_mult": [1, 2], "num_head_channels": 64}
    start = with_start(make((300,), resolution=SIZE, model=size, start=str(out))).start
    assert start is not None
    assert start.seen == "an unknown number of images"
    assert start.setting == "imported"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guided") / "model.pt"
    torch.save(guided_state(), path)
    return path


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_folder(tmp_path_factory.mktemp("diffusers") / "unet", guided_state())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def test_nothing_is_unpickled_but_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate(({"a": Harmful()}, {"a": 1}, [torch.zeros(1)])):
        torch.save(content, f"{number}.pt")
    Path("3.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    Path("4.pt").write_bytes(b"")
    Path("5.safetensors").write_bytes(b"12345678")
    torch.save(guided_state(), "6.pt")
    Path("6.pt").write_bytes(Path("6.pt").read_bytes()[:-100])
    for name in ("0.pt", "1.pt", "2.pt", "3.pt", "4.pt", "5.safetensors", "6.pt", "none.pt"):
        with pytest.raises(UserError, match=rf"^import: [^\n]*'{name}'[^\n]*$"):
            read_checkpoint(Path(name), ARGUMENTS)
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"resblock_updown": False}, "import: found resblock_updown False in 'model.pt', expected True"),
        ({"use_scale_shift_norm": False}, "import: found use_scale_shift_norm False in 'model.pt', expected True"),
        ({"rescale_timesteps": True, "diffusion_steps": 4000}, "import: found rescale_timesteps True"),
        ({"num_head_channels": -1, "num_heads": 4, "attention_resolutions": "8,4"}, "heads of 32 and of 64 channels"),
        ({"channel_mult": "0.5,1"}, "--arguments: channel_mult: found '0.5,1', expected whole numbers above 0"),
        ({"num_chanels": 128}, "--arguments: found 'num_chanels' (did you mean 'num_channels'?)"),
        ({"class_cond": "no"}, "--arguments: class_cond: found 'no', expected true or false"),
        ({"diffusion_steps": "many"}, "schedule.timesteps: found 'many', expected a whole number"),
        ({"num_res_blocks": "two"}, "--arguments: num_res_blocks: found 'two', expected a whole number"),
        ({"num_channels": 64}, "found group norms of 32 groups over 64 channels in 'model.pt', expected 16 groups"),
        (
            {"num_channels": 256},
            "weights 'time_embed.0.weight' of shape [512, 128] in 'model.pt', expected [1024, 256]",
        ),
        (
            {"num_res_blocks": 2},
            "weights 'input_blocks.3.0.in_layers.2.weight' of shape [256, 128, 3, 3] in 'model.pt'",
        ),
        ({"attention_resolutions": "8,4"}, "import: found no weights 'input_blocks.1.1.norm.weight'"),
        ({"attention_resolutions": "2"}, "import: found no weights 'output_blocks.1.1.in_layers.0.weight'"),
        ({"class_cond": True}, "class_cond True and no weights 'label_emb.weight'"),
        ({"noise_schedule": "sqrt"}, "schedule.base: found 'sqrt'"),
    ],
)
def test_the_first_difference_of_a_checkpoint_is_named(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.pt").symlink_to(saved)
    with pytest.raises(UserError) as caught:
        import_unet(read_checkpoint(Path("model.pt"), {**ARGUMENTS, **arguments}), Path("out"), "model.pt")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            "found _class_name UNet2DConditionModel in 'unet', expected UNet2DModel",
        ),
        (
            {"resnet_time_scale_shift": "default"},
            "found resnet_time_scale_shift default in 'unet', expected scale_shift",
        ),
        ({"norm_eps": 1e-6}, "found norm_eps 1e-06 in 'unet', expected 1e-05"),
        ({"freq_shift": 1}, "found freq_shift 1 in 'unet', expected 0"),
        ({"attn_norm_num_groups": None}, "found attn_norm_num_groups None in 'unet', expected 32"),
        ({"downsample_type": "conv", "down_block_types": ["AttnDownBlock2D"] * 2}, "found downsample_type conv"),
        (
            {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]},
            "found down_block_types[0] DownBlock2D in 'unet', expected AttnDownBlock2D or ResnetDownsampleBlock2D",
        ),
        ({"up_block_types": ["UpBlock2D"] * 2}, "found up_block_types[0] UpBlock2D in 'unet', expected AttnUpBlock2D"),
        ({"block_out_channels": [128, 192]}, "found block_out_channels [128, 192] in 'unet', expected multiples"),
        ({"block_out_channels": []}, "expected block_out_channels"),
        ({"block_out_channels": [0, 0]}, "expected block_out_channels"),
        ({"up_block_types": ["AttnUpBlock2D"]}, "expected block_out_channels, down_block_types, up_block_types"),
        ({"in_channels": 1}, "found in_channels 1 in 'unet', expected 3"),
        ({"sample_size": None}, "expected block_out_channels, down_block_types, up_block_types and sample_size"),
        ({"num_class_embeds": 10}, "found no weights 'class_embedding.weight' in 'unet'"),
    ],
)
def test_the_first_difference_of_a_folder_is_named(
    unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unet").mkdir()
    Path("unet/diffusion_pytorch_model.safetensors").symlink_to(unet / "diffusion_pytorch_model.safetensors")
    Path("unet/config.json").write_text(json.dumps({**CONFIG, **config}))
    with pytest.raises(UserError) as caught:
        import_unet(read_folder(Path("unet"), {}), Path("out"), "unet")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_files_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^import: found no file '.*config.json', expected the folder of a UNet2DModel"
    ):
        read_folder(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"^import: found no file '.*diffusion_pytorch_model.safetensors'"):
        read_folder(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_folder(tmp_path, {})
