"""A registered model as MLflow runs it: images of the classes, or of the prompts, that are asked for.

MLflow copies this file into the model's folder and executes it when a release is registered and when it is loaded;
it only defines, and imports the networks when a model is loaded.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray

from dp_lora.config.schema import Sampling
from dp_lora.errors import InputError


class ReleasedModel(PythonModel):
    """Base model and release. Artifact `release`; artifact `base`, or the folder that model_config's `base` names."""

    def load_context(self, context: PythonModelContext) -> None:
        """Put the adapter on its base. Raises InputError for a base that is missing, or not the release's own."""
        from dp_lora.models.adapters import adapter_info, apply_adapter
        from dp_lora.models.device import pick_device
        from dp_lora.models.folder import load_model
        from dp_lora.models.info import model_digest

        release = Path(context.artifacts["release"])
        base = Path(context.artifacts.get("base") or context.model_config["base"])
        named = adapter_info(release)["base"]
        if not base.is_dir() or model_digest(base) != named["digest"]:
            raise InputError(
                f"{base}: is not the base model {named['path']} of this release, whose digest is {named['digest']}; "
                "name its folder by load_model(..., model_config={'base': FOLDER})"
            )
        self._model = apply_adapter(load_model(base, pick_device("auto")), release)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.uint8]:
        """`n` images for each row's `class`, or `prompt` of a text-to-image base: uint8 (rows * n, H, W, C), in order.

        The i-th image of a class or prompt is that of the entry point `sample` with the same settings, up to rounding.
        Raises MlflowException for a class that the model does not know, an empty prompt, and settings that it cannot
        draw with.
        """
        from dp_lora.sampling import draw_in_batches

        given = dict(params or {})
        seed, n = given.pop("seed"), given["n"]
        own = {name: value for name, value in context.model_config.items() if name not in ("base", "size")}
        settings = Sampling(**given, **own)
        model, of_prompts = self._model, self._model.class_embedding is None
        # of a dictionary of lists MLflow makes one row
        cells = (
            cell if isinstance(cell, list) else [cell] for cell in model_input["prompt" if of_prompts else "class"]
        )
        names = [str(name).strip() if of_prompts else str(name) for cell in cells for name in cell]
        if of_prompts:
            if not all(names):
                raise MlflowException.invalid_parameter_value("a prompt is empty; write what the image is to show")
            asked = {"size": context.model_config["size"], "classes": list(dict.fromkeys(names))}
            model = replace(model, info={**model.info, **asked})
        unknown = sorted(set(names) - set(model.classes))
        if unknown or not names or n < 1:
            problem = f"class {unknown[0]!r} is unknown" if unknown else f"{n} images of each of {len(names)} rows"
            known = "" if of_prompts else f"; the model knows {', '.join(model.classes[:20])}"
            raise MlflowException.invalid_parameter_value(f"{problem}{known}")
        seen: Counter[str] = Counter()
        wanted: list[tuple[int, int]] = []
        for name in names:
            wanted += [(model.classes.index(name), seen[name] + i) for i in range(n)]
            seen[name] += n
        device = model.device
        labels, indices = zip(*wanted, strict=True)
        try:
            return draw_in_batches(model, labels, indices, settings, seed, device)
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


set_model(ReleasedModel())
