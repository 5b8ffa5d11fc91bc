"""The Vision Transformer as a transformers model."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from vitds.errors import UserError
from vitds.models.activation_checkpointing import per_block
from vitds.models.config import ViTConfig
from vitds.models.initialisers import Initial, Initialised, zeros
from vitds.models.layers import AttentionPool, Block, Classifier, LayerNorm, PatchEmbed, position_embedding
from vitds.models.losses import LOSSES


class ViTForImageClassification(Initialised, PreTrainedModel):
    """A Vision Transformer with MAP, mean or [class]-token pooling and a linear classifier.

    Parameter names and shapes are timm's. `shapes` has every parameter's whole shape, also where the live tensor is on
    the meta device or cut up by ZeRO-3.
    """

    config: ViTConfig
    pos_embed: torch.Tensor
    cls_token: torch.Tensor

    config_class = ViTConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]  # noqa: RUF012 (declared so by transformers)
    _supports_sdpa = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        width = config.width
        self.patch_embed = PatchEmbed(width, config.patch_size)
        self.declare("pos_embed", (1, config.num_patches, width), position_embedding(width))
        if config.pool == "token":
            self.declare("cls_token", (1, 1, width), zeros)
        self.blocks = nn.ModuleList([Block(width, config.mlp_dim, config.num_heads) for _ in range(config.depth)])
        self.norm = LayerNorm(width)
        if config.pool == "map":
            self.attn_pool = AttentionPool(width, config.mlp_dim, config.num_heads)
        if config.num_classes > 0:
            self.head = Classifier(width, config.num_classes, config.init_head_bias)
        self.table: dict[str, Initial] = {
            f"{prefix}.{name}".lstrip("."): initial
            for prefix, module in self.named_modules()
            if isinstance(module, Initialised)
            for name, initial in module.initials.items()
        }
        self.shapes: dict[str, tuple[int, ...]] = {name: initial.shape for name, initial in self.table.items()}
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        features_only: bool = False,
    ) -> ImageClassifierOutput:
        """Logits, and the loss if there are labels.

        Args:
            pixel_values: (B, 3, S, S), floating point in [−1, 1]; cast to the weights' precision here.
            labels: class numbers (B,), or targets (B, C): soft or multi-hot.
            features_only: leave the classifier out; `logits` are the pooled features (B, D). An argument and not a
                method, because under ZeRO-3 parameters are only whole while forward runs.

        Returns:
            loss (scalar, fp32, mean over the batch) and logits ((B, C), fp32). Without a classifier the logits are the
            pooled features (B, D).

        Raises:
            UserError: images of another size or of integers, or labels for a model without a classifier.
        """
        features = self.forward_head(self.forward_features(pixel_values), pre_logits=features_only)
        loss = None
        if labels is not None:
            if features_only or self.config.num_classes == 0:
                raise UserError("labels: a model without a classifier has no loss")
            loss = LOSSES[self.config.loss](features, labels)
        return ImageClassifierOutput(loss=loss, logits=features)  # type: ignore[arg-type]

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) to normalised tokens (B, N, D); with a [class] token (B, 1 + N, D), that token first."""
        side = self.config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise UserError(
                f"pixel_values: expected (B, 3, {side}, {side}) as image_size says, found {tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise UserError(f"pixel_values: expected floating point in [-1, 1], found {pixel_values.dtype}")
        x = self.patch_embed(pixel_values.to(self.pos_embed.dtype)) + self.pos_embed  # (B, N, D)
        if self.config.pool == "token":
            # After the position embedding: the token has none of its own.
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, tokens: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Normalised tokens to logits (B, C) in fp32, or with `pre_logits` (or no classifier) to features (B, D)."""
        if self.config.pool == "map":
            features = self.attn_pool(tokens)
        elif self.config.pool == "gap":
            features = tokens.mean(dim=1)
        else:
            features = tokens[:, 0]
        return features if pre_logits or self.config.num_classes == 0 else self.head(features)

    def _init_weights(self, module: nn.Module) -> None:
        """Only what was not loaded, and only by the module's own rules; transformers' default would overwrite them."""
        if isinstance(module, Initialised):
            own = dict(module.named_parameters(recurse=False))
            module.reset_parameters([name for name in own if not getattr(own[name], "_is_hf_initialized", False)])

    def initial_tensor(self, name: str, seed: int) -> torch.Tensor:
        """The initial value of a parameter, fp32 on the CPU: a pure function of (seed, name).

        It reads no live parameter, so it is the same on the meta device, in 16 bits and under ZeRO-3.
        """
        return self.table[name].tensor(name, seed)

    def factored_views(self) -> dict[str, tuple[int, ...]]:
        """For every parameter the shape in which a factored optimizer sees it, heads apart.

        The reference has a matrix per head of q, k, v and the output projection; a fused weight would factor otherwise.
        """
        heads, head_dim, width = self.config.num_heads, self.config.shape.head_dim, self.config.width
        apart = {
            "attn.qkv.weight": (3, heads, head_dim, width),
            "attn.qkv.bias": (3, heads, head_dim),
            "attn.proj.weight": (width, heads, head_dim),
            "attn_pool.q.weight": (heads, head_dim, width),
            "attn_pool.q.bias": (heads, head_dim),
            "attn_pool.kv.weight": (2, heads, head_dim, width),
            "attn_pool.kv.bias": (2, heads, head_dim),
            "attn_pool.proj.weight": (width, heads, head_dim),
        }
        return {name: apart.get(".".join(name.split(".")[-3:]), shape) for name, shape in self.shapes.items()}

    def decay_patterns(self) -> list[tuple[str, str]]:
        """(group, regex) in order; a parameter belongs to the first that matches its whole name.

        Weight decay falls on "head" (the classifier's kernel) and "kernels" (every other kernel: patches, attention,
        MLPs, MAP head), not on "rest": biases, norms, position embedding, [class] token, probe.
        """
        projections = r"patch_embed\.proj|(blocks\.\d+\.attn|attn_pool)\.(qkv|q|kv|proj)"
        mlps = r"(blocks\.\d+|attn_pool)\.mlp\.fc[12]"
        patterns = [("kernels", rf"({projections}|{mlps})\.weight"), ("rest", r".*")]
        return [("head", r"head\.weight"), *patterns] if self.config.num_classes else patterns

    def set_activation_checkpointing(self, policy: str) -> None:
        """Choose what blocks keep for the backward pass: "none" (keep all), "full", "every:N" or "selective".

        Raises:
            UserError: an unknown policy.
        """
        for block, recompute in zip(self.blocks, per_block(policy, len(self.blocks)), strict=True):
            cast(Block, block).recompute = recompute

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile every block in place (parameter names do not change); options are torch.compile's."""
        for block in self.blocks:
            block.compile(**options)
