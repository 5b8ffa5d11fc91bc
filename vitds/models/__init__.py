"""The Vision Transformer: shapes, configuration, model, losses, image processor, model card."""

import sys

import transformers
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vitds.models.card import Result, Training, model_card
from vitds.models.config import ModelSection, ViTConfig, build_config, label_names
from vitds.models.execution import ATTENTION, COMPILE_MODES, check_compile_mode, execute_as
from vitds.models.image_processor import VitdsImageProcessor
from vitds.models.losses import LOSSES
from vitds.models.shapes import VARIANTS, Shape, flops_per_image, parameter_count, variant_shape
from vitds.models.transfer import resample_position_embedding
from vitds.models.vit import ViTForImageClassification

__all__ = [
    "ATTENTION",
    "COMPILE_MODES",
    "LOSSES",
    "VARIANTS",
    "ModelSection",
    "Result",
    "Shape",
    "Training",
    "ViTConfig",
    "ViTForImageClassification",
    "VitdsImageProcessor",
    "build_config",
    "check_compile_mode",
    "execute_as",
    "flops_per_image",
    "label_names",
    "model_card",
    "parameter_count",
    "resample_position_embedding",
    "variant_shape",
]

# Without torchvision, transformers 5 shows a placeholder under this name that raises on every use, although the class
# itself needs Pillow alone. Importing it made transformers replace its own module: both hold a placeholder.
for module in (transformers, sys.modules["transformers"]):
    if getattr(module.AutoImageProcessor, "is_dummy", False):
        setattr(module, "AutoImageProcessor", AutoImageProcessor)  # noqa: B010 (a type checker knows only the class)
AutoConfig.register(ViTConfig.model_type, ViTConfig, exist_ok=True)
AutoModelForImageClassification.register(ViTConfig, ViTForImageClassification, exist_ok=True)
# Under both names, so that transformers finds it whether or not torchvision is installed.
AutoImageProcessor.register(
    ViTConfig,
    image_processor_classes={"pil": VitdsImageProcessor, "torchvision": VitdsImageProcessor},
    exist_ok=True,
)
