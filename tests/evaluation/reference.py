"""The few-shot probe in numpy and float64, written from the equations: draws, whitening, and both forms of ridge regression by an
eigendecomposition."""

from __future__ import annotations

import numpy as np


def drawn(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of the images of one draw."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.where(labels == c)[0])[:shots] for c in range(labels.max() + 1)])


def ridge(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean (D,), std (D,), weights (D + 1, C))."""
    features = features.astype(np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-5
    x = np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
    y = 2.0 * np.eye(num_classes)[labels] - 1.0
    if len(x) >= x.shape[1]:
        e, q = np.linalg.eigh(x.T @ x)
        return mean, std, q @ np.diag(1 / (e + l2)) @ q.T @ (x.T @ y)
    e, q = np.linalg.eigh(x @ x.T)
    return mean, std, x.T @ q @ np.diag(1 / (e + l2)) @ (q.T @ y)


def predictions(solution: tuple[np.ndarray, np.ndarray, np.ndarray], features: np.ndarray) -> np.ndarray:
    mean, std, weights = solution
    return np.argmax(np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=100.0) @ weights, axis=1)
