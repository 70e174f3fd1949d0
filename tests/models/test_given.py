"""An image that is given with a request: what is kept of it, and what does not fit, in one sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dvdp.errors import UserError
from dvdp.models.export import TrainedModel, load_model
from dvdp.models.given import Given, given
from tests.tracking.support import small_model

#: Of the model that draws.
SIDE = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return load_model(small_model(tmp_path_factory.mktemp("model") / "m.safetensors"))


def pixels(side: int = SIDE, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(array: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def hole(side: int = SIDE) -> NDArray[np.uint8]:
    """White in its right half."""
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[:, side // 2 :] = 255
    return mask


def drawn(model: TrainedModel, count: int = 3, **request: Any) -> NDArray[np.int64]:
    images = model.sample(count, seed=1, given=given(SIDE, **request))
    return images.permute(0, 2, 3, 1).numpy().astype(int)


def blocks(x: NDArray[Any], side: int) -> NDArray[Any]:
    """Means of ``side`` x ``side`` pixels."""
    *first, height, width, channels = x.shape
    return x.reshape(*first, height // side, side, width // side, side, channels).mean((-4, -2))


def test_what_is_black_in_a_mask_stays_to_the_bit_and_the_hole_differs_by_image(model: TrainedModel) -> None:
    image = pixels()
    x = drawn(model, image=png(image), mask=png(hole()))
    assert (x[:, :, :4] == image[:, :4]).all()
    assert (x[0, :, 4:] != x[1, :, 4:]).any()
    assert (x[:, :, 4:] != image[:, 4:]).any()


def test_an_upscaled_image_has_the_small_one_as_its_means(model: TrainedModel) -> None:
    for factor in (2, 4):
        small = pixels(SIDE // factor)
        x = drawn(model, image=png(small), upscale=factor)
        # Each pixel is rounded, by 1/2 at most.
        assert np.abs(blocks(x, factor) - small).max() <= 0.5
        assert (x[0] != x[1]).any()


def test_a_colourised_image_has_the_brightness_of_the_grey_one(model: TrainedModel) -> None:
    grey = pixels()[:, :, 0]
    for picture in (grey, np.stack([grey] * 3, axis=-1)):
        x = drawn(model, image=png(picture), colourise=True)
        assert np.abs(x @ (0.299, 0.587, 0.114) - grey).max() <= 1
        assert x.std(axis=-1).mean() > 1


def test_image_to_image_stays_the_nearer_the_weaker_it_is(model: TrainedModel) -> None:
    image = pixels()
    near = [np.abs(drawn(model, image=png(image), strength=strength) - image).mean() for strength in (0.001, 0.3, 1.0)]
    assert near == sorted(near)
    assert near[0] < 5 < near[1]
    with_mask = drawn(model, image=png(image), mask=png(hole()), strength=0.3)
    assert (with_mask[:, :, :4] == image[:, :4]).all()


def test_larger_pictures_are_averaged_and_a_pixel_with_a_part_of_the_hole_is_drawn(model: TrainedModel) -> None:
    large, mask = pixels(3 * SIDE), np.zeros((3 * SIDE, 3 * SIDE), dtype=np.uint8)
    mask[:, 13:] = 255
    x = drawn(model, image=png(large), mask=png(mask))
    assert np.abs(x[:, :, :4] - blocks(large, 3)[:, :4]).max() <= 0.5 + 1e-4
    known = given(SIDE, png(large), png(mask))
    assert known is not None
    assert known.known is not None
    assert known.known[0, 0, 0].tolist() == [True] * 4 + [False] * 4


def test_the_same_request_draws_the_same_images_in_any_split(model: TrainedModel) -> None:
    request: dict[str, Any] = {"image": png(pixels(SIDE // 2)), "upscale": 2}
    whole = drawn(model, 4, **request)
    later = model.sample(2, seed=1, first=2, given=given(SIDE, **request)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(later, whole[2:], atol=1)


def test_nothing_given_is_nothing() -> None:
    assert given(SIDE) is None
    assert Given(torch.zeros(1, 3, SIDE, SIDE)).resampling == 1
    masked = given(SIDE, png(pixels()), png(hole()))
    assert masked is not None
    assert masked.resampling == 5


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"mask": hole()}, "^image: found none beside mask, expected the picture that it is for; give one.$"),
        ({"resampling": 2}, "^image: found none beside resampling, expected the picture"),
        ({"image": pixels()}, "^image: found it alone, expected mask, upscale, strength or colourise beside it"),
        (
            {"image": pixels(), "mask": hole(16)},
            "^mask: found 16 x 16 px, expected the size of the image, 8 x 8; resize",
        ),
        ({"image": pixels(12), "strength": 0.5}, "^image: found 12 x 12 px, expected 8 x 8 or a multiple of it; crop"),
        ({"image": pixels(16)[:8], "strength": 0.5}, "^image: found 16 x 8 px, expected 8 x 8 or a multiple of it"),
        ({"image": pixels(6), "upscale": 2}, "^image: found 6 x 6 px, expected 4 x 4 or a multiple of it; crop"),
        ({"image": hole(), "strength": 0.5}, r"^image: found 1 channel \(L\), expected 3 \(RGB\); convert it.$"),
        ({"image": np.dstack([pixels(), hole()]), "strength": 0.5}, r"^image: found 4 channels \(RGBA\), expected 3"),
        ({"image": pixels(), "strength": 0.0}, "^strength: found 0.0, expected a number above 0 and at most 1"),
        ({"image": pixels(), "strength": 1.5}, "^strength: found 1.5, expected a number above 0 and at most 1"),
        (
            {"image": pixels(), "upscale": 3},
            "^upscale: found 3, expected a power of 2, at least 2, that divides 8 px.$",
        ),
        ({"image": pixels(), "upscale": "two"}, "^upscale: found 'two', expected a power of 2"),
        ({"image": pixels(), "strength": "half"}, "^strength: found 'half', expected a number above 0 and at most 1.$"),
        ({"image": pixels(), "colourise": "yes"}, "^colourise: found 'yes', expected true or false.$"),
        (
            {"image": pixels(), "mask": hole(), "resampling": 1.5},
            "^resampling: found 1.5, expected a whole number of 1",
        ),
        ({"image": pixels(), "upscale": 16}, "^upscale: found 16, expected a power of 2"),
        ({"image": pixels(), "upscale": 1}, "^upscale: found 1, expected a power of 2"),
        (
            {"image": pixels(), "upscale": 2, "strength": 0.5},
            "^strength: found it beside upscale, expected one of them",
        ),
        ({"image": pixels(), "mask": hole(), "upscale": 2}, "^upscale: found it beside mask, expected one of them"),
        (
            {"image": pixels(), "mask": hole(), "resampling": 0},
            "^resampling: found 0, expected a whole number of 1 to 100",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(request_: dict[str, Any], sentence: str) -> None:
    bytes_ = {name: png(value) if isinstance(value, np.ndarray) else value for name, value in request_.items()}
    with pytest.raises(UserError, match=sentence):
        given(SIDE, **bytes_)


def test_what_is_no_picture_is_one_sentence(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    whole = png(pixels(64))
    large = Image.new("RGB", (4097, 4096))
    large.save(tmp_path / "large.png")
    for source, found in (
        (text, "what is no picture '.*text.png'"),
        (b"no picture", "what is no picture"),
        (whole[: len(whole) // 2], "what is no picture"),
        (tmp_path / "large.png", "4097 x 4096 px"),
    ):
        with pytest.raises(
            UserError, match=rf"^image: found {found}, expected PNG, JPEG, .* of at most 16,777,216 pixels.$"
        ):
            given(SIDE, source, strength=0.5)
    with pytest.raises(UserError, match=r"^mask: found no file '.*none.png', expected a picture; give its path.$"):
        given(SIDE, whole[:0] + png(pixels()), tmp_path / "none.png")
