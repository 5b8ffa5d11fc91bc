"""The README saved beside a model: what it is, how it came about, what it is worth, and how to open it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vitds.models.config import ViTConfig
from vitds.models.shapes import parameter_count

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


@dataclass(frozen=True)
class Result:
    """One figure of a model."""

    data: str
    """Name of the set of images."""
    metric: str
    """For a reader, as in "top-1"."""
    value: float
    share: bool = True
    """A fraction of images that are right, which is `accuracy` for the hub; anything else is not for its index."""


@dataclass(frozen=True)
class Training:
    """How a model came about, in words for a reader; see vitds.checkpoint.facts."""

    data: Sequence[str]
    recipe: Mapping[str, str]
    results: Sequence[Result] = ()
    results_of: str = ""
    """Of which weights, where they are not those beside the card."""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def model_card(config: ViTConfig, training: Training | None = None) -> str:
    """README.md of a saved model: front matter as the hub reads it, then for people."""
    shape = config.shape
    title = config.variant or f"ViT {shape.width} wide, {shape.depth} deep, patches of {shape.patch_size}"
    fold = ""
    if config.num_classes:
        fold = f"state['head.bias'] += {config.init_head_bias!r}  # init_head_bias: the model adds it to its logits\n"
    scores = "sigmoid" if config.loss == "sigmoid" else "softmax"
    return f"""---
{_front_matter(config, title, training)}
---
# {title}

A Vision Transformer {"trained with vitds" if training else "in vitds' format"}: {config.image_size}×{config.image_size} pixels, {config.pool} pooling, \
{config.num_classes} classes, {config.loss} cross-entropy.
Width {shape.width}, depth {shape.depth}, MLP {shape.mlp_dim}, {shape.num_heads} heads, patches of {shape.patch_size}; \
{parameter_count(config):,} parameters.
Inputs are RGB in [−1, 1]. GELU is the tanh form, layer norms have epsilon 1e-6.
{_said_of(training)}
## vitds and transformers

`vitds predict --checkpoint DIRECTORY photo.jpg` prints labels with scores, `vitds evaluate` measures a set of images.

```python
import vitds  # registers the classes
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

labels = pipeline("image-classification", model="DIRECTORY")  # labels("photo.jpg")

model = AutoModelForImageClassification.from_pretrained("DIRECTORY")
processor = AutoImageProcessor.from_pretrained("DIRECTORY")
# scores = model(**processor(image, return_tensors="pt")).logits.{scores}({"-1" if scores == "softmax" else ""})
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


def _front_matter(config: ViTConfig, title: str, training: Training | None) -> str:
    """YAML, of which JSON is a part: every text is written as JSON writes it."""
    lines = ["library_name: transformers"]
    if config.num_classes:
        lines.append("pipeline_tag: image-classification")
    lines.append("tags: [vision, image-classification, vision-transformer, vitds]")
    results = [one for one in (training.results if training else ()) if one.share]
    if results and training is not None and not training.results_of:
        lines += ["model-index:", f"- name: {_yaml(title)}", "  results:"]
        for name in dict.fromkeys(one.data for one in results):
            lines += [
                "  - task: {type: image-classification}",
                f"    dataset: {{name: {_yaml(name)}, type: {_yaml(name)}}}",
                "    metrics:",
                *(
                    f"    - {{type: accuracy, name: {_yaml(one.metric)}, value: {one.value!r}}}"
                    for one in results
                    if one.data == name
                ),
            ]
    return "\n".join(lines)


def _yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _said_of(training: Training | None) -> str:
    """How it came about, and what it is worth."""
    if training is None:
        return ""
    lines = ["", "## Training", "", *(f"- {text}" for text in training.data)]
    lines += [f"- {name}: {text}" for name, text in training.recipe.items()]
    lines += [""] * bool(training.notes) + list(training.notes)
    if training.results:
        of = f" ({training.results_of})" if training.results_of else ""
        lines += ["", f"## Evaluation{of}", "", "| images | measured | value |", "|---|---|---:|"]
        lines += [
            f"| {_cell(one.data)} | {_cell(one.metric)} | {f'{one.value:.2%}' if one.share else f'{one.value:.4g}'} |"
            for one in training.results
        ]
    if training.versions:
        lines += [
            "",
            "Written by " + ", ".join(f"{name} {version}" for name, version in training.versions.items()) + ".",
        ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
