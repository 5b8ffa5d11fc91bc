"""The parts of the Vision Transformer, under timm's parameter names and shapes.

"Scaling Vision Transformers" (arXiv 2106.04560) §3.2 and "An Image is Worth 16x16 Words" (arXiv 2010.11929), §3.1.
Shapes: B images, N tokens, D width, H heads, d width of a head, M mlp_dim, C classes, P patch size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from vitds.models.activation_checkpointing import recomputed
from vitds.models.initialisers import Fill, Initialised, lecun_normal, normal, ones, xavier_uniform, zeros

EPSILON = 1e-6


class Linear(Initialised):
    """x Wᵀ + b; W is (outputs, inputs)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, inputs: int, outputs: int, weight: Fill, bias: Fill = zeros) -> None:
        super().__init__()
        self.declare("weight", (outputs, inputs), weight)
        self.declare("bias", (outputs,), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Classifier(Linear):
    """Logits in fp32 (fp64 of fp64 weights), also of 16-bit weights: a bf16 logit near −10 moves in steps of 0.06."""

    def __init__(self, width: int, num_classes: int, constant_bias: float) -> None:
        super().__init__(width, num_classes, zeros)
        self.constant_bias = constant_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precision = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(precision), self.weight.to(precision), self.bias.to(precision))  # (B, C)
        return logits + self.constant_bias


class LayerNorm(Initialised):
    """Layer normalisation over the width; torch computes its statistics in fp32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.declare("weight", (width,), ones)
        self.declare("bias", (width,), zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, tuple(self.weight.shape), self.weight, self.bias, EPSILON)


class PatchProjection(Initialised):
    """A convolution of stride P without padding, computed as one matrix product over cut patches.

    As a product its weight gradient is the same in every run; cuDNN's convolution gives no such promise.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.declare("weight", (width, 3, patch_size, patch_size), lecun_normal(3 * patch_size**2))
        self.declare("bias", (width,), zeros)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = self.patch_size
        rows, columns = images.shape[2] // size, images.shape[3] // size
        cut = images[:, :, : rows * size, : columns * size]
        cut = cut.reshape(-1, 3, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, 3, P, P)
        return F.linear(cut.reshape(-1, rows * columns, 3 * size**2), self.weight.flatten(1), self.bias)  # (B, N, D)


class PatchEmbed(nn.Module):
    """Images to tokens; exists to give the projection timm's name."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = PatchProjection(width, patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ/√d) v per head, (B, H, N, d), by torch's fused kernels."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # On CPUs torch 2.13's fused backward takes 15 times as long in bf16 as in fp32 (docs/LOG.md, 2026-11-20).
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ/√d) v per head, then a projection; biases everywhere."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, xavier_uniform(width, width))
        self.proj = Linear(width, width, xavier_uniform(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # 3 × (B, H, N, d)
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, mlp_dim, xavier_uniform(width, mlp_dim), normal(1e-6))
        self.fc2 = Linear(mlp_dim, width, xavier_uniform(mlp_dim, width), normal(1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, mlp_dim)
        self.recompute = "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute == "none" or not self._has_gradient(x):
            return self.residuals(x)
        return recomputed(self.residuals, x, self.recompute)

    def _has_gradient(self, x: torch.Tensor) -> bool:
        """Whether a backward pass will come here: not where everything up to here is frozen."""
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def residuals(self, x: torch.Tensor) -> torch.Tensor:
        """The block itself, (B, N, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPool(Initialised):
    """Multi-head attention pooling (MAP): one learned probe attends to all tokens, then an MLP with a residual.

    x = attention(probe, tokens); x + mlp(norm(x)). No residual around the attention, no norm on the probe or after.
    """

    latent: torch.Tensor

    def __init__(self, width: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # The reference takes the probe (1, 1, D) for a matrix from 1 to D.
        self.declare("latent", (1, 1, width), xavier_uniform(1, width))
        self.q = Linear(width, width, xavier_uniform(width, width))
        self.kv = Linear(width, 2 * width, xavier_uniform(width, width))
        self.proj = Linear(width, width, xavier_uniform(width, width))
        self.norm = LayerNorm(width)
        self.mlp = Mlp(width, mlp_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        q = self.q(self.latent).view(1, 1, self.num_heads, -1).transpose(1, 2)  # (1, H, 1, d)
        split = self.kv(tokens).view(batch, count, 2, self.num_heads, -1)
        k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # 2 × (B, H, N, d)
        x = attend(q.expand(batch, -1, -1, -1), k, v)  # (B, H, 1, d)
        x = self.proj(x.reshape(batch, width))
        return x + self.mlp(self.norm(x))  # (B, D)


def position_embedding(width: int) -> Fill:
    """Normal of standard deviation 1/√D, not truncated."""
    return normal(1 / math.sqrt(width))
