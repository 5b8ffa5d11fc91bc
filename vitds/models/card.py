"""The README saved beside a model: how to open it with transformers, timm or plain safetensors."""

from __future__ import annotations

from vitds.models.config import ViTConfig

TIMM_NAMES = {
    "ViT-Ti/16": "vit_tiny_patch16_224",
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-S/32": "vit_small_patch32_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-B/32": "vit_base_patch32_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
    "ViT-G/14": "vit_gigantic_patch14_224",
}
POOL_ARGUMENTS = {
    "map": "class_token=False, global_pool='map'",
    "gap": "class_token=False, global_pool='avg', fc_norm=False",
    "token": "class_token=True, no_embed_class=True, global_pool='token'",
}


def timm_call(config: ViTConfig) -> str:
    """The `timm.create_model(…)` whose parameters are this model's, by name and shape."""
    name = TIMM_NAMES.get(config.variant or "")
    shape = ""
    if name is None:
        name = "vit_base_patch16_224"
        shape = (
            f"embed_dim={config.width}, depth={config.depth}, num_heads={config.num_heads}, "
            f"mlp_ratio={_mlp_ratio(config.width, config.mlp_dim)}, patch_size={config.patch_size}, "
        )
    return (
        f"timm.create_model('{name}', {shape}img_size={config.image_size}, {POOL_ARGUMENTS[config.pool]}, "
        f"act_layer='gelu_tanh', num_classes={config.num_classes})"
    )


def _mlp_ratio(width: int, mlp_dim: int) -> str:
    """A ratio r that timm's int(width · r) turns into mlp_dim; the plain quotient may be rounded to one less."""
    return f"{mlp_dim}/{width}" if int(width * (mlp_dim / width)) == mlp_dim else repr((mlp_dim + 0.5) / width)


def model_card(config: ViTConfig) -> str:
    """README.md of a saved model."""
    shape = config.shape
    title = config.variant or f"ViT {shape.width} wide, {shape.depth} deep, patches of {shape.patch_size}"
    fold = ""
    if config.num_classes:
        fold = f"state['head.bias'] += {config.init_head_bias!r}  # init_head_bias: the model adds it to its logits\n"
    scores = "sigmoid" if config.loss == "sigmoid" else "softmax"
    return f"""---
library_name: transformers
pipeline_tag: image-classification
---
# {title}

A Vision Transformer trained with vitds: {config.image_size}×{config.image_size} pixels, {config.pool} pooling, \
{config.num_classes} classes, {config.loss} cross-entropy.
Width {shape.width}, depth {shape.depth}, MLP {shape.mlp_dim}, {shape.num_heads} heads, patches of {shape.patch_size}.
Inputs are RGB in [−1, 1]. GELU is the tanh form, layer norms have epsilon 1e-6.

## transformers

```python
import vitds  # registers the classes
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("DIRECTORY")
processor = AutoImageProcessor.from_pretrained("DIRECTORY")
scores = model(**processor(image, return_tensors="pt")).logits.{scores}({"-1" if scores == "softmax" else ""})
```

## timm

The weights carry timm's names and shapes.

```python
import glob
import timm
from safetensors.torch import load_file

model = {timm_call(config)}
state = {{}}
for path in glob.glob("DIRECTORY/model*.safetensors"):
    if "model.ema" not in path:
        state.update(load_file(path))
{fold}model.load_state_dict(state)
```

`init_head_bias` ({config.init_head_bias!r}) is a constant that this model adds to its logits and keeps in config.json.
In any other format it must be folded into `head.bias`, as above.
"""
