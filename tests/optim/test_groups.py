"""Parameter groups: partition, precedence, and each mistake as one clear line."""

from __future__ import annotations

import pytest

from vitds.errors import UserError
from vitds.optim.groups import build_groups, describe

SHAPES = {
    "patch.weight": (8, 3), "patch.bias": (8,), "pos_embed": (1, 4, 8), "blocks.0.fc.weight": (8, 8),
    "blocks.0.fc.bias": (8,), "blocks.1.fc.weight": (8, 8), "blocks.1.fc.bias": (8,),
    "head.weight": (5, 8), "head.bias": (5,),
}  # fmt: skip
PATTERNS = [("head", r"head\.weight"), ("kernels", r".*\.weight"), ("rest", r".*")]


def build(overrides=(), shapes=SHAPES, head=3.0):
    return build_groups(
        shapes, lr=1e-3, weight_decay=0.03, head_weight_decay=head, decay_patterns=PATTERNS, overrides=overrides
    )


def summary(groups):
    return {g.name: (len(g.names), g.numel, g.lr_mult, g.weight_decay, g.frozen) for g in groups}


def test_default_groups_decay_kernels_only_and_the_head_more():
    assert summary(build()) == {
        "head": (1, 40, 1.0, 3.0, False), "kernels": (3, 152, 1.0, 0.03, False), "rest": (5, 61, 1.0, 0.0, False)
    }  # fmt: skip
    assert summary(build(head=None))["head"][3] == 0.03
    without_head = {name: shape for name, shape in SHAPES.items() if not name.startswith("head")}
    assert [g.name for g in build(shapes=without_head)] == ["kernels", "rest"]


def test_first_match_wins_and_what_a_pattern_leaves_open_keeps_its_decay():
    groups = build([[r"blocks\.0\..*", {"lr_mult": 0.1}], [r"blocks\..*", {"weight_decay": 0.5, "lr_mult": 0.2}]])
    assert summary(groups) == {
        r"blocks\.0\..* (kernels)": (1, 64, 0.1, 0.03, False),
        r"blocks\.0\..* (rest)": (1, 8, 0.1, 0.0, False),
        r"blocks\..*": (2, 72, 0.2, 0.5, False),
        "head": (1, 40, 1.0, 3.0, False),
        "kernels": (1, 24, 1.0, 0.03, False),
        "rest": (3, 45, 1.0, 0.0, False),
    }
    assert sorted(n for g in groups for n in g.names) == sorted(SHAPES)
    assert all(g.lr == 1e-3 for g in groups), "the multiplier is kept apart from the base rate"


def test_frozen_parameters_are_one_marked_group():
    groups = build([[r"(patch|pos_embed).*", {"frozen": True}]])
    assert summary(groups)["(patch|pos_embed).*"] == (3, 64, 1.0, 0.0, True)
    table = describe(groups)
    assert table.splitlines()[0].split() == ["group", "tensors", "parameters", "lr", "weight", "decay"]
    assert "frozen" in table
    assert "0.001" in table
    assert "3" in table.splitlines()[2].split()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([["blocks", {"lr_mult": 0.1}]], r"vitds.groups\[0\]: the pattern 'blocks' matches no parameter"),
        ([["pos_embd", {"frozen": True}]], r"did you mean 'pos_embed'"),
        ([[".*bias", {}], ["patch.bias", {"lr_mult": 2}]], r"vitds.groups\[1\].*taken by an earlier pattern"),
        ([["(", {}]], r"vitds.groups\[0\]: '\(' is not a regular expression"),
        ([[".*", {"lr_mlt": 2}]], r"vitds.groups\[0\].lr_mlt: unknown key \(did you mean 'lr_mult'\?\)"),
        ([[".*", {"lr_mult": 0}]], r"lr_mult: 0.0 is not a number > 0"),
        ([[".*", {"weight_decay": -1}]], r"weight_decay: -1.0 is not"),
        ([[".*", {"weight_decay": "0"}]], r"weight_decay: expected a number"),
        ([".*"], r"vitds.groups\[0\]: expected \[pattern"),
        ([[".*", {"frozen": True}]], r"every parameter is frozen"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        build(overrides)
