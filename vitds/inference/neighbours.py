"""`vitds neighbours`: which images lie nearest to which, by what `vitds embed` wrote; and how often their labels agree."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from vitds import dist
from vitds.data_verbs.arguments import at_least_one, different_numbers
from vitds.errors import UserError
from vitds.evaluation.neighbours import METRICS, TEMPERATURE, knn_accuracy, nearest
from vitds.inference.embeddings import Embeddings, finite, open_embeddings
from vitds.inference.outputs import check_output, written
from vitds.progress import Progress

QUERIES = 1024
"""At a time."""


def add_verb(verbs: Any) -> None:
    """Add `neighbours` to the parser's verbs."""
    summary = "find nearest neighbours among embeddings, exactly; measure kNN accuracy; write a faiss index"
    parser = verbs.add_parser("neighbours", help=summary, description=summary)
    parser.add_argument("bank", type=Path, metavar="DIR", help="embeddings among which neighbours are looked for")
    parser.add_argument("--query", type=Path, metavar="DIR", help="embeddings whose neighbours are looked for; those of DIR itself when absent, an image then being no neighbour of itself")  # fmt: skip
    parser.add_argument("--neighbours", type=at_least_one, metavar="K", default=5, help="of each image; 5")
    parser.add_argument("--metric", choices=METRICS, default="cosine", help="cosine when absent")
    parser.add_argument("--show", metavar="KEY,… or N", default="3", help="images whose neighbours are shown, by key, or the number of them; 3")  # fmt: skip
    parser.add_argument("--knn", type=different_numbers, metavar="K,…", help="also the accuracy of a vote of the K nearest, as in 10,20: a neighbour of cosine s votes with "
                        f"exp(s/{TEMPERATURE}); of DIR itself leave-one-out")  # fmt: skip
    parser.add_argument(
        "--index", type=Path, metavar="FILE.faiss", help="write an exact faiss index of DIR; needs faiss"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(options: argparse.Namespace) -> int:
    """Look, and print.

    Raises:
        UserError: embeddings that cannot be used, of different models, too few for so many neighbours, labels that cannot vote.
    """
    check_output("--index", options.index, (".faiss",))
    if options.index is not None and find_spec("faiss") is None:
        raise UserError("--index: needs faiss, which is not installed (pip install 'vitds[faiss]')")
    bank = open_embeddings(options.bank, "DIR")
    query = bank if options.query is None else open_embeddings(options.query, "--query")
    _comparable(bank, query)
    alone, most = query is bank, max([options.neighbours, *(options.knn or [])])
    if most > bank.rows - alone:
        raise UserError(f"{bank.path}: {bank.rows} images; {most} neighbours of each are more than there are")
    bank_keys, labels = bank.keys_and_labels()
    keys, query_labels = (bank_keys, labels) if alone else query.keys_and_labels()
    found: dict[str, Any] = {"bank": str(bank.path), "query": str(query.path), "metric": options.metric}
    if options.knn:
        votes = _knn(bank, query, labels, query_labels, options.knn)
        found["knn_accuracy"] = {str(k): share for k, share in votes.items()}
    shown = _shown(options.show, keys, query)
    if shown:
        device = dist.device()
        rows = _rows(query, shown).to(device)
        own = torch.tensor(shown) if alone else None
        near = nearest(rows, bank.blocks, options.neighbours, options.metric, own)
        found["neighbours"] = [
            {"key": keys[row], "label": query_labels[row],
             "nearest": [{"key": bank_keys[i], "label": labels[i], options.metric: _measured(score, options.metric)}
                         for i, score in zip(ids, scores, strict=True)]}
            for row, ids, scores in zip(shown, near.rows.tolist(), near.scores.tolist(), strict=True)
        ]  # fmt: skip
    if options.index is not None:
        _write_index(bank, options.metric, options.index)
        found["index"] = str(options.index)
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.json else _described(found, bank, query, options))
    return 0


def _measured(score: float, metric: str) -> float:
    return score if metric == "cosine" else -score


def _comparable(bank: Embeddings, query: Embeddings) -> None:
    """Refuse features of other models."""
    if bank.width != query.width:
        raise UserError(f"--query {str(query.path)!r}: features of {query.width} numbers, {bank.path} has {bank.width}")
    for name in ("checkpoint", "step", "ema"):
        if bank.manifest.get(name) != query.manifest.get(name):
            raise UserError(
                f"--query {str(query.path)!r}: made by {name} {query.manifest.get(name)!r}, {bank.path} by "
                f"{bank.manifest.get(name)!r}: distances between them mean nothing"
            )


def _shown(text: str, keys: Sequence[str], query: Embeddings) -> list[int]:
    """Rows by key, or so many that are spread over all."""
    if text.isascii() and text.isdigit():
        number = min(int(text), len(keys))
        return [i * len(keys) // number for i in range(number)]
    wanted = text.split(",")
    row_of = {key: row for row, key in enumerate(keys)}
    missing = [key for key in wanted if key not in row_of]
    if missing:
        raise UserError(f"--show: {missing[0]!r} is not among the images of {query.path}; keys look like {keys[0]!r}")
    return [row_of[key] for key in wanted]


def _rows(embeddings: Embeddings, wanted: Sequence[int]) -> torch.Tensor:
    """Rows (len(wanted), D), read by themselves."""
    found, end = dict[int, torch.Tensor](), 0
    for part in embeddings.parts:
        start, end = end, end + part.rows
        here = [row for row in wanted if start <= row < end]
        if here:
            with safe_open(embeddings.path / part.features, framework="pt") as file:
                stored = file.get_slice("features")
                found |= {
                    row: finite(stored[row - start : row - start + 1], embeddings.path / part.features, row - start)
                    for row in here
                }
    return torch.cat([found[row] for row in wanted])


def _knn(
    bank: Embeddings, query: Embeddings, labels: Sequence[Any], query_labels: Sequence[Any], ks: Sequence[int]
) -> dict[int, float]:
    ours, theirs = (_as_classes(one, of) for one, of in ((bank, labels), (query, query_labels)))
    names = [one.manifest.get("source", {}).get("class_names") for one in (bank, query)]
    if names[0] and names[1] and names[0] != names[1]:
        raise UserError(f"--knn: {bank.path} and {query.path} number their classes differently")
    device = dist.device()

    def queries() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        start = 0
        for rows in query.blocks(QUERIES):
            numbers = torch.arange(start, start + len(rows))
            yield rows.to(device), theirs[numbers], numbers if query is bank else None
            start += len(rows)

    with Progress("comparing", query.rows) as progress:
        return knn_accuracy(queries(), bank.blocks, ours, ks, progress.add)


def _as_classes(embeddings: Embeddings, labels: Sequence[Any]) -> torch.Tensor:
    if any(isinstance(label, list) for label in labels):
        raise UserError(f"--knn: images of {embeddings.path} have several labels each; a vote is for one class")
    return torch.tensor(labels, dtype=torch.int64)


def _write_index(bank: Embeddings, metric: str, path: Path) -> None:
    """An exact index; rows are numbered as in the embeddings. By cosine it holds unit vectors, and wants such queries."""
    import faiss

    index = faiss.IndexFlatIP(bank.width) if metric == "cosine" else faiss.IndexFlatL2(bank.width)
    for block in bank.blocks():
        rows = np.ascontiguousarray(block.float().numpy())
        if metric == "cosine":
            faiss.normalize_L2(rows)
        index.add(rows)
    with written("--index", path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # faiss's own, of a full disk too
            raise OSError(str(error)) from None


def _described(found: dict[str, Any], bank: Embeddings, query: Embeddings, options: argparse.Namespace) -> str:
    """For a reader."""
    lines = [f"{bank.path}: {bank.rows:,} × {bank.width}"]
    against = "leave-one-out" if query is bank else f"{query.rows:,} of {query.path}"
    for k, share in found.get("knn_accuracy", {}).items():
        lines.append(f"{k}-nearest-neighbour accuracy by cosine: {share:.2%} ({against})")
    names = bank.manifest.get("source", {}).get("class_names") or []

    def labelled(row: dict[str, Any]) -> str:
        known = isinstance(row["label"], int) and row["label"] < len(names)
        return f"{row['key']} ({names[row['label']] if known else row['label']})"

    for one in found.get("neighbours", []):
        lines.append(f"{labelled(one)}, nearest by {options.metric}:")
        lines += [f"  {near[options.metric]:8.4f}  {labelled(near)}" for near in one["nearest"]]
    if "index" in found:
        lines.append(f"faiss index: {found['index']}")
    return "\n".join(lines)
