"""transformers' image-classification pipeline, seeing what training saw. Importing this puts it in its place."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY, ImageClassificationPipeline

from vitds.errors import UserError
from vitds.models.image_processor import VitdsImageProcessor

TASK = "image-classification"


class ClassificationPipeline(ImageClassificationPipeline):
    """transformers' own, but a model of ours gets its images as they are.

    transformers makes every image RGB before an image processor sees it: what is transparent takes whatever colour is
    stored under it, and 16-bit grey is clipped to white. Training shows what is transparent as white and the high byte
    of 16 bits (vitds.pictures), and so does the processor, if it is let. What is fetched from a URL, or given in base64,
    is opened by transformers, and made RGB as it does.
    """

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]  # as its superclass
        """A path, a Pillow image, an array, a tensor, a URL or base64 to the model's inputs."""
        if not isinstance(self.image_processor, VitdsImageProcessor):
            return super().preprocess(image, timeout)
        if self.model.config.num_labels == 0:
            raise UserError("this model has no classifier, and no labels to give; vitds embed writes its features")
        if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
            with Image.open(image) as found:
                return self._inputs(found)
        if not isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
            image = load_image(image, timeout=timeout)
        return self._inputs(image)

    def _inputs(self, image: Any) -> Any:
        assert self.image_processor is not None
        return self.image_processor(images=image, return_tensors="pt").to(self.dtype)


# Its entry alone is exchanged: register_pipeline would forget the task's default model, and warn.
PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = ClassificationPipeline
