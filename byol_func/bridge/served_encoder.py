"""The code of an encoder that mlflow serves: it is copied into the folder of the model and needs no other file of ours.

mlflow runs it when it saves or loads such a model. Nothing here imports it.
"""

from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Encoder(PythonModel):
    """An exported graph, from images to embeddings."""

    def load_context(self, context: Any) -> None:
        """Loads the graph."""
        self._embed = torch.export.load(context.artifacts['encoder']).module()

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        """Returns the embeddings, float32 `[B, D]`, of images, float32 `[B, C, H, W]` in 0..1.

        Raises:
          ValueError: values are not in 0..1.
        """
        images = torch.from_numpy(np.array(model_input, dtype=np.float32))
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f'images in {images.min():.3g}..{images.max():.3g}: expected floats in 0..1')
        with torch.no_grad():
            return self._embed(images).numpy()


set_model(Encoder())
