"""``dvdp serve``: a page to draw images from a registered model. Programs ask ``mlflow models serve`` instead."""

from __future__ import annotations

import threading
from typing import Any

import mlflow.pyfunc
import pandas as pd
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

from dvdp.config import Params
from dvdp.diffusion.solvers import SOLVERS
from dvdp.models.export import TrainedModel
from pipelines.loopback import LoopbackOnly
from pipelines.reports.text_tables import as_page
from pipelines.tracking.champion import CHAMPION
from pipelines.tracking.job_runs import model_name
from pipelines.tracking.lookup import looked_up

HOST = "127.0.0.1"


def serve(params: Params, address: str | None, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        address: of a registered model, see :func:`pipelines.tracking.lookup.looked_up`; None for the champion.
        port: on loopback.

    Raises:
        UserError: there is no such model, or MLflow does not answer.
    """
    address = address or f"models:/{model_name(params)}@{CHAMPION}"
    with looked_up(params, address) as (client, version):
        mlflow.set_tracking_uri(client.tracking_uri)
        model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    print(f"Draw from {address}: open http://{HOST}:{port}", flush=True)
    uvicorn.run(pages(model, address), host=HOST, port=port, log_level="warning")


def pages(model: PyFuncModel, title: str) -> FastAPI:
    """The page at ``/``, and at ``/draw`` the images of a request: JSON as ``model_code.ImageModel.predict`` has it."""
    trained: TrainedModel = model.unwrap_python_model().model
    app, alone = FastAPI(), threading.Lock()
    app.add_middleware(LoopbackOnly)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        names, counts = (trained.classes.names, trained.classes.counts) if trained.classes else ((), ())
        return as_page(
            "draw.html",
            title=title,
            resolution=trained.resolution,
            labels=[name for name, count in zip(names, counts, strict=False) if count],
            solvers=list(SOLVERS),
            sampling=trained.run.sampling,
            guidance=trained.run.training.label_dropout > 0,
        )

    @app.post("/draw")
    def draw(request: dict[str, Any]) -> JSONResponse:
        try:
            with alone:  # Several at a time would take longer each, and more memory.
                drawn: Any = model.predict(pd.DataFrame([request]))
        except MlflowException as error:
            return JSONResponse({"message": error.message}, 400)
        return JSONResponse(drawn.to_dict("records"))

    return app
