"""The registered model, as MLflow runs it: "model from code", one file and no pickle.

It is copied into the model beside the weights (``weights.safetensors``) and the source of ``dvdp`` itself, so it
runs where ``dvdp`` is not installed; what it needs is what ``dvdp`` needs without extras, and mlflow.

    model = mlflow.pyfunc.load_model("models:/dvdp-digits@champion")
    model.predict(pd.DataFrame([{"count": 4, "seed": 0, "solver": "ddpm", "steps": 250}]))  # uint8 (4, H, W, 3)
    model.predict(pd.DataFrame([{"count": 4, "label": "7"}]))  # of one class, of a class-conditional model
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from tqdm import tqdm

from dvdp.diffusion.sampling import Progress
from dvdp.errors import UserError
from dvdp.models.export import load_model


class ImageModel(PythonModel):
    """Draws images; each row of the input is one request."""

    def load_context(self, context: Any) -> None:
        """Read the weights, onto a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(context.artifacts["weights"], device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Images of all rows, one after the other.

        Args:
            model_input: rows of ``count`` and, optionally, ``seed``, ``solver``, ``steps`` and ``label``; what is
                missing or null is as in the training run's ``sampling``, and classes are drawn. Image i of a seed is
                the same image in any batch, on one kind of device.

        Returns:
            uint8 (n, H, W, 3).

        Raises:
            UserError: a value is out of range.
        """
        frame = pd.DataFrame(model_input)
        if frame.empty:
            raise UserError("input: found no rows, expected at least one with a count of images.")
        requests = [
            {key: value for key, value in row.items() if not pd.isna(value)} for row in frame.to_dict("records")
        ]
        for request in requests:
            if not request.get("count", 0) >= 1:
                raise UserError(f"count: found {request.get('count')}, expected a number of images, at least 1.")
        return np.concatenate([self._draw(**request) for request in requests])

    def _draw(
        self,
        count: int,
        seed: int | None = None,
        solver: str | None = None,
        steps: int | None = None,
        label: str | None = None,
    ) -> np.ndarray:
        defaults = self._model.run.sampling
        calls = (steps or defaults.steps) * math.ceil(count / defaults.batch)
        with tqdm(total=calls, desc=f"{count} images", unit="call", disable=None, leave=False) as bar:

            def advance(progress: Progress) -> None:
                bar.update()

            images = self._model.sample(count, seed=seed, solver=solver, steps=steps, label=label, callback=advance)
        return images.permute(0, 2, 3, 1).contiguous().numpy()


set_model(ImageModel())
