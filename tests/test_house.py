"""The house's plan (docs/design.md §2) holds: floors, the one DeepSpeed room, the length of the page that tells the story."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from vitds.config import load_run_file
from vitds.config_docs import config_docs
from vitds.data.transforms import build_transforms
from vitds.errors import UserError
from vitds.models import ViTForImageClassification, build_config, variant_shape
from vitds.optim.groups import build_groups

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "errors": 0, "sections": 0, "layout": 0, "dist": 0, "schedules": 0,
    "models": 1, "train_section": 2, "optim": 1, "data": 1, "metrics": 1, "run_directory": 1, "lease": 0, "json_files": 0, "guard": 1,
    "interruption": 0, "launched": 0, "identity": 0, "host_memory": 0, "shards": 0, "progress": 0, "lengths": 1, "pictures": 0, "plots": 0, "cluster": 1, "planning": 2, "data_verbs": 2,
    "zero": 2, "evaluation": 2, "checkpoint": 3, "inference": 4, "config": 4, "arguments": 5, "check": 5, "cli": 5, "config_docs": 5, "trial": 5, "launcher": 5,
}  # fmt: skip
LONGEST = 330
RUN_FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def sources() -> list[Path]:
    return sorted([*(ROOT / "vitds").rglob("*.py"), *(ROOT / "launcher").glob("*.py")])


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "launcher" else parts[1]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports; of vitds, `vitds.<room>`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"vitds.{a.name}" for a in node.names} if node.module == "vitds" else {node.module}
    return {".".join(name.split(".")[: 2 if name.startswith("vitds.") else 1]) for name in found}


def test_arrows_point_down():
    wrong = []
    for path in sources():
        here = room(path)
        if here == "__init__":
            continue
        for name in imported(path):
            if name.startswith("vitds.") and (there := name.split(".")[1]) != here and there in FLOORS:
                own_floor = FLOORS[here] == FLOORS[there] and FLOORS[here] > 0
                if FLOORS[there] > FLOORS[here] or (own_floor and FLOORS[here] != 5):
                    wrong.append(
                        f"{path.relative_to(ROOT)} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"
                    )
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_floor():
    assert {room(path) for path in sources()} - {"__init__"} <= set(FLOORS)


def test_one_room_imports_deepspeed():
    assert {room(path) for path in sources() if "deepspeed" in imported(path)} == {"zero"}


def test_nothing_unpickles():
    """Nothing read from disk can run code: no pickle, no torch.load, no numpy allow_pickle."""
    words = ("import pickle", "torch.load(", "torch.save(", "allow_pickle=True", "eval(", "exec(")
    allowed = {"model.eval(", "engine.eval("}
    found = []
    for path in sources():
        text = path.read_text()
        for word in allowed:
            text = text.replace(word, "")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in words if f" {word}" in text or f"\n{word}" in text]
    assert not found, found


def test_the_launcher_is_one_page():
    assert len((ROOT / "launcher" / "train.py").read_text().splitlines()) < 150


def test_files_hold_one_idea():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not long, long


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.stem)
def test_every_shipped_run_file_is_complete(path: Path):
    """Loads on some world size, builds its model on the meta device, its groups and its schedule; explicit where DeepSpeed's
    defaults surprise; opens with what it is for."""
    given = json.loads(path.read_text())
    assert next(iter(given)) == "_about"
    assert {"command", "hardware", "expected"} <= set(given["_about"])
    assert f"ds_configs/{path.name}" in given["_about"]["command"]
    assert {"gradient_clipping", "communication_data_type"} <= set(given)
    assert "grad_accum_dtype" in given["data_types"]
    run = load_run_file(str(path), world_size=8)
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(run.vitds.model))
    assert dict(model.named_parameters()).keys() == model.shapes.keys()
    model.set_activation_checkpointing(run.vitds.train.activation_checkpointing)
    groups = build_groups(model.shapes, **run.rates, decay_patterns=model.decay_patterns(), overrides=run.vitds.groups)
    assert sum(group.numel for group in groups) == sum(p.numel() for p in model.parameters())
    lengths = run.lengths(1_281_167)
    assert 0 < max(lengths.schedule(k) for k in range(0, lengths.total, max(1, lengths.total // 100))) <= 1
    for section, role in ((run.vitds.data.train, "train"), (run.vitds.data.eval, "eval")):
        if section is not None and section.transforms is not None:
            build_transforms(section.transforms, run.vitds.model.image_size, f"vitds.data.{role}.transforms")


def test_every_run_file_of_the_paper_is_there():
    names = {path.stem for path in RUN_FILES}
    assert {f"{m}_zero{s}" for m in ("giant_g14", "gigantic_G14") for s in (1, 2, 3)} <= names
    used = {json.loads(path.read_text())["optimizer"]["type"] for path in RUN_FILES}
    assert {"ModifiedAdafactor", "HalfPrecisionMomentumAdam", "HalfPrecisionMomentumSGD"} <= used


def test_a_typo_in_a_variant_is_named():
    with pytest.raises(UserError, match="ViT-G/14"):
        variant_shape("ViT-GG/14")


def test_nothing_names_a_private_machine():
    """Paths of the machine this was written on do not belong in a repository."""
    bad = []
    for path in [
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
        *ROOT.glob("docs/*"),
        *ROOT.glob("ds_configs/*"),
        *sources(),
        *ROOT.glob("benchmarks/*"),
    ]:
        if path.is_file() and any(
            word in path.read_text(errors="ignore") for word in ("/root/", "/home/", "/wor" + "k/")
        ):
            bad.append(str(path.relative_to(ROOT)))
    assert not bad, bad


def test_the_reference_of_keys_is_what_the_sections_say():
    assert (ROOT / "docs" / "config.md").read_text() == config_docs() + "\n", "make docs"
