"""The registered model, as MLflow runs it: "model from code", one file and no pickle.

It is copied into the model beside the weights (``weights.safetensors``) and the source of ``dvdp`` itself, so it
runs where ``dvdp`` is not installed; what it needs is what ``dvdp`` needs without extras, and mlflow.

    model = mlflow.pyfunc.load_model("models:/dvdp-digits@champion")
    model.predict(pd.DataFrame([{"count": 4, "seed": 0, "steps": 250}]))  # a row an image: image, seed, index, label
    model.predict(pd.DataFrame([{"count": 4, "label": "7"}]))  # of one class, of a class-conditional model
"""

from __future__ import annotations

import base64
import io
import secrets
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc import PythonModel
from PIL import Image
from tqdm import tqdm

from dvdp.diffusion.sampling import Progress
from dvdp.errors import UserError
from dvdp.models.export import load_model
from dvdp.models.given import given

#: Images of all rows of a request together, at most: a server answers none before all are drawn.
MOST_IMAGES = 256
FORMATS = ("png", "numbers")


class RequestRefusedError(MlflowException):
    """A request that cannot be met, in one sentence."""

    # MLflow's server puts the whole request before a message; it stays the sentence.
    message = property(lambda self: self.args[0], lambda self, _: None)


class ImageModel(PythonModel):
    """Draws images; each row of the input is one request."""

    def load_context(self, context: Any) -> None:
        """Read the weights, onto a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(context.artifacts["weights"], device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Images of all rows, one after the other.

        Args:
            model_input: rows of ``count`` and, optionally, ``seed`` (else a random one), ``first`` (number of the first
                image of the seed, 0), ``label``, ``format`` (``png``, or ``numbers``), ``solver``, ``steps`` and
                ``guidance`` (a number, or one a level). Where the last three are missing or null they are as in the
                training run's ``sampling``; without a label, classes are drawn. Image i of a seed is the same image in
                any request on one kind of device, within 1/255, and bit for bit in requests of the same count. A
                picture may be given: ``image`` and ``mask`` in base64, ``upscale``, ``strength``, ``colourise`` and
                ``resampling``, see :func:`dvdp.models.given.given`.

        Returns:
            A row for each image: ``image``, a PNG in base64 or uint8 (H, W, 3); the ``seed`` and ``index`` that draw
            it again; and its ``label``, null for none.

        Raises:
            RequestRefusedError: a value is out of range.
        """
        rows = pd.DataFrame(model_input).to_dict("records")
        requests = [{key: value for key, value in row.items() if not _is_missing(value)} for row in rows]
        try:
            if not requests:
                raise UserError("input: found no rows, expected at least one with a count of images.")
            for request in requests:
                if not request.get("count", 0) >= 1:
                    raise UserError(f"count: found {request.get('count')}, expected a number of images, at least 1.")
                if request.get("first", 0) < 0:
                    raise UserError(f"first: found {request['first']}, expected the number of an image, at least 0.")
                if request.get("format", "png") not in FORMATS:
                    raise UserError(f"format: found '{request['format']}', expected one of {', '.join(FORMATS)}.")
            total = sum(request["count"] for request in requests)
            if total > MOST_IMAGES:
                raise UserError(
                    f"count: found {total:,} images in a request, expected at most {MOST_IMAGES}; ask for the others"
                    " with the same seed and another 'first'."
                )
            return pd.concat([self._draw(**request) for request in requests], ignore_index=True)
        except UserError as error:
            raise RequestRefusedError(str(error), BAD_REQUEST) from None

    def _draw(
        self,
        count: int,
        seed: int | None = None,
        first: int = 0,
        solver: str | None = None,
        steps: int | None = None,
        label: str | None = None,
        guidance: float | list[float] | None = None,
        format: str = "png",
        image: str | None = None,
        mask: str | None = None,
        **request: Any,
    ) -> pd.DataFrame:
        model = self.model
        known = given(model.resolution, _decoded(image, "image"), _decoded(mask, "mask"), **request)
        seed = secrets.randbelow(2**31) if seed is None else seed
        evaluations = (steps or model.run.sampling.steps) * count
        with tqdm(total=evaluations, desc=f"{count} images", unit="evaluation", disable=None, leave=False) as bar:

            def advance(progress: Progress) -> None:
                bar.update(len(progress.state))

            options: dict[str, Any] = {"seed": seed, "first": first, "solver": solver, "steps": steps, "label": label}
            options |= {"guidance": guidance, "given": known}
            images = model.sample(count, **options, callback=advance).permute(0, 2, 3, 1).contiguous().numpy()
        drawn = None if label else model.labels(seed, first, count)
        names = [label] * count if drawn is None else [self._name(number) for number in drawn.tolist()]
        return pd.DataFrame(
            {
                "image": [_png(image) for image in images] if format == "png" else list(images),
                "seed": seed,
                "index": range(first, first + count),
                "label": names,
            }
        )

    def _name(self, label: int) -> str | None:
        names = self.model.classes.names if self.model.classes else ()
        return None if label < 0 else str(names[label] if label < len(names) else label)


def _decoded(text: str | None, name: str) -> bytes | None:
    """A picture from base64."""
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError(f"{name}: found '{text[:20]}...', expected a picture in base64.") from None


def _is_missing(value: Any) -> bool:
    """Null, as MLflow and pandas say it; a list is there."""
    return not isinstance(value, list | np.ndarray) and bool(pd.isna(value))


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


set_model(ImageModel())
