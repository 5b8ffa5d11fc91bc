"""big_vision trees of random numbers in every layout, and their forward pass in float64, written from the equations.

"An Image is Worth 16x16 Words" (arXiv 2010.11929), equations 1 to 4; attention pooling as "Scaling Vision Transformers"
(arXiv 2106.04560) §3.2 has it. Heads are an axis of the kernels: (D, H, d) before attention, (H, d, D) after it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

Tree = dict[str, np.ndarray]
WIDTH, DEPTH, MLP, HEADS, PATCH, SIDE, CLASSES = 24, 3, 40, 3, 4, 5, 7
"""A side of 5 patches: 25 is no square plus one."""
MHA, NORM, PERCEPTRON = "MultiHeadDotProductAttention_0", "LayerNorm", "MlpBlock_0"


def tree(pool: str, classes: int = CLASSES, seed: int = 0) -> Tree:
    """Today's names without a prefix, block by block, fp32."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    def norm(name: str) -> Tree:
        return {f"{name}/scale": draw(WIDTH), f"{name}/bias": draw(WIDTH)}

    def attention(name: str) -> Tree:
        head = WIDTH // HEADS
        out = {f"{name}/out/kernel": draw(HEADS, head, WIDTH), f"{name}/out/bias": draw(WIDTH)}
        for each in ("query", "key", "value"):
            out |= {f"{name}/{each}/kernel": draw(WIDTH, HEADS, head), f"{name}/{each}/bias": draw(HEADS, head)}
        return out

    def perceptron(name: str) -> Tree:
        return {
            f"{name}/Dense_0/kernel": draw(WIDTH, MLP), f"{name}/Dense_0/bias": draw(MLP),
            f"{name}/Dense_1/kernel": draw(MLP, WIDTH), f"{name}/Dense_1/bias": draw(WIDTH),
        }  # fmt: skip

    made = {"embedding/kernel": draw(PATCH, PATCH, 3, WIDTH), "embedding/bias": draw(WIDTH)}
    made["pos_embedding"] = draw(1, SIDE * SIDE, WIDTH)
    if pool == "token":
        made["cls"] = draw(1, 1, WIDTH)
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        made |= norm(f"{block}/{NORM}_0") | attention(f"{block}/{MHA}") | norm(f"{block}/{NORM}_1")
        made |= perceptron(f"{block}/{PERCEPTRON}")
    made |= norm("Transformer/encoder_norm")
    if pool == "map":
        made |= {"MAPHead_0/probe": draw(1, 1, WIDTH)} | attention(f"MAPHead_0/{MHA}")
        made |= norm(f"MAPHead_0/{NORM}_0") | perceptron(f"MAPHead_0/{PERCEPTRON}")
    if classes:
        made |= {"head/kernel": draw(WIDTH, classes), "head/bias": draw(classes)}
    return made


def scanned(given: Tree) -> Tree:
    """Blocks stacked along a first axis."""
    first = "Transformer/encoderblock_0/"
    made = {key: value for key, value in given.items() if "encoderblock_" not in key}
    for key in given:
        if key.startswith(first):
            rest = key.removeprefix(first)
            layers = [given[f"Transformer/encoderblock_{i}/{rest}"] for i in range(DEPTH)]
            made[f"Transformer/encoderblock/{rest}"] = np.stack(layers)
    return made


def aged(given: Tree) -> Tree:
    """The names of the older releases."""
    made = {}
    for key, value in given.items():
        if "encoderblock" in key:
            key = key.replace(f"/{NORM}_1/", f"/{NORM}_2/").replace(f"/{MHA}/", "/MultiHeadDotProductAttention_1/")
            key = key.replace(f"/{PERCEPTRON}/", "/MlpBlock_3/")
        made[key.replace("MAPHead_0/", "").replace("pos_embedding", "Transformer/posembed_input/pos_embedding")] = value
    return made


def with_class_entry(given: Tree, seed: int = 1) -> Tree:
    """With an entry for the [class] token before the others in the position embedding."""
    entry = np.random.default_rng(seed).normal(0, 0.3, (1, 1, WIDTH)).astype(np.float32)
    return {**given, "pos_embedding": np.concatenate([entry, given["pos_embedding"]], axis=1)}


def under(prefix: str, given: Tree) -> Tree:
    return {prefix + key: value for key, value in given.items()}


def features(given: Tree, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features (B, D) and logits (B, C) (without a head the features) of images (B, S, S, 3)."""
    p = {key: value.astype(np.float64) for key, value in given.items()}
    batch, side = images.shape[0], images.shape[1] // PATCH
    cut = images.astype(np.float64).reshape(batch, side, PATCH, side, PATCH, 3)
    x = np.einsum("bipjqc,pqcd->bijd", cut, p["embedding/kernel"]) + p["embedding/bias"]
    x = x.reshape(batch, side * side, WIDTH)
    position = p["pos_embedding"]
    if position.shape[1] == side * side + 1:  # added after the token has been put before the patches
        x = np.concatenate([np.repeat(p["cls"], batch, axis=0), x], axis=1) + position
    else:
        x = x + position
        if "cls" in p:
            x = np.concatenate([np.repeat(p["cls"], batch, axis=0), x], axis=1)
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        y = _norm(p, f"{block}/{NORM}_0", x)
        x = x + _attention(p, f"{block}/{MHA}", y, y)
        x = x + _perceptron(p, f"{block}/{PERCEPTRON}", _norm(p, f"{block}/{NORM}_1", x))
    x = _norm(p, "Transformer/encoder_norm", x)
    if "MAPHead_0/probe" in p:
        probe = np.repeat(p["MAPHead_0/probe"], batch, axis=0)
        x = _attention(p, f"MAPHead_0/{MHA}", probe, x)
        x = (x + _perceptron(p, f"MAPHead_0/{PERCEPTRON}", _norm(p, f"MAPHead_0/{NORM}_0", x)))[:, 0]
    else:
        x = x[:, 0] if "cls" in p else x.mean(axis=1)
    return x, x @ p["head/kernel"] + p["head/bias"] if "head/kernel" in p else x


def _norm(p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    variance = np.maximum((x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2, 0)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]


def _attention(p: Tree, name: str, queries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    q, k, v = (
        np.einsum("bnd,dhk->bhnk", x, p[f"{name}/{each}/kernel"]) + p[f"{name}/{each}/bias"][:, None]
        for each, x in (("query", queries), ("key", tokens), ("value", tokens))
    )
    scores = np.einsum("bhnk,bhmk->bhnm", q / np.sqrt(q.shape[-1]), k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhnm,bhmk->bnhk", weights, v)
    return np.einsum("bnhk,hkd->bnd", mixed, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]


def _perceptron(p: Tree, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ p[f"{name}/Dense_0/kernel"] + p[f"{name}/Dense_0/bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y @ p[f"{name}/Dense_1/kernel"] + p[f"{name}/Dense_1/bias"]


def save(path: Path, given: Tree, *, deflated: bool = False) -> Path:
    """An .npz as numpy writes it."""
    (np.savez_compressed if deflated else np.savez)(path, **given)  # type: ignore[arg-type]
    return path


def as_bf16(given: Tree) -> tuple[Tree, Tree]:
    """The tree rounded to bfloat16, as the two-byte voids that JAX's arrays of it become, and the same numbers in fp32."""
    voids, rounded = {}, {}
    for key, value in given.items():
        bits = np.ascontiguousarray(value).view(np.uint32)
        upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
        voids[key] = upper.view("V2").reshape(value.shape)
        rounded[key] = (upper.astype(np.uint32) << 16).view(np.float32).reshape(value.shape)
    return voids, rounded
