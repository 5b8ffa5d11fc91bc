"""Frozen parameters under every stage: they keep their bits, are not in the clipped norm and have no state, against float64."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ranks
from tests.zero import frozen
from vitds.models import ViTForImageClassification, build_config

WORLDS = (1, 2, 3)


def reference(part: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Float64 SGD by the equations of docs/recipe.md §3: norms over what is trained, over everything, and the parameters."""
    model = ViTForImageClassification(build_config(frozen.MODEL)).double()
    values = frozen.start()
    model.load_state_dict({name: value.double() for name, value in values.items()})
    parameters, norms, whole = dict(model.named_parameters()), [], []
    settings = [(re.compile(pattern), setting) for pattern, setting in frozen.FROZEN[part]]
    rates = {}
    for name in parameters:
        found = next((setting for pattern, setting in settings if pattern.fullmatch(name)), {})
        rates[name] = 0.0 if found.get("frozen") else frozen.SGD["params"]["lr"] * found.get("lr_mult", 1.0)
    momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(frozen.STEPS):
        images, labels = frozen.batch(step)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images.double()).logits, labels).backward()
        squares = {name: float(p.grad.square().sum()) for name, p in parameters.items()}
        norms.append(sum(squares[name] for name in parameters if rates[name]) ** 0.5)
        whole.append(sum(squares.values()) ** 0.5)
        with torch.no_grad():
            for name, p in parameters.items():
                if rates[name]:
                    m = p.grad / max(1.0, (norms[-1] + 1e-6) / frozen.CLIP) + 0.9 * momentum[name]
                    p.sub_(m, alpha=rates[name])
                    momentum[name] = m.float().bfloat16().double()
    return norms, whole, {name: p.detach() for name, p in parameters.items()}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, tuple[list[dict], dict[str, dict[str, torch.Tensor]]]]:
    """World size -> the ranks' facts, and by case the whole final parameters."""
    shapes, found = {name: value.shape for name, value in frozen.start().items()}, {}
    for world in WORLDS:
        directory = tmp_path_factory.mktemp(f"frozen{world}")
        done = ranks(world, Path(frozen.__file__), directory, timeout=900)
        assert (directory / "rank0.json").exists(), done.stdout[-4000:]
        assert done.returncode == 0, done.stdout[-3000:]
        whole: dict[str, dict[str, torch.Tensor]] = {}
        for rank in range(world):
            for key, value in load_file(directory / f"rank{rank}.safetensors").items():
                case, name, begin = key.split("|")
                tensor = whole.setdefault(case, {}).setdefault(name, torch.full(shapes[name], float("nan")))
                tensor.view(-1)[int(begin) : int(begin) + value.numel()] = value
        facts = [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(world)]
        found[world] = facts, whole
    return found


@pytest.mark.launch
def test_what_is_frozen_is_not_in_the_norm_by_which_the_rest_is_clipped(worlds):
    references, tried = {part: reference(part) for part in frozen.FROZEN}, 0
    for norms, whole, _ in references.values():
        assert min(norms) > frozen.CLIP, "every step clips, or the norm would make no difference"
        assert min(all_of / some for some, all_of in zip(norms, whole, strict=True)) > 1.1, "it would show"
    for world, (facts, _) in worlds.items():
        for case, fact in facts[0].items():
            norms = references[case.split(", ")[1]][0]
            assert fact["norms"] == pytest.approx(norms, rel=1e-5 if case.startswith("fp32") else 0.02), (world, case)
            tried += 1
    assert tried >= 2 * sum(map(len, frozen.CASES.values()))


@pytest.mark.launch
def test_the_rest_is_trained_as_the_equations_say(worlds):
    references = {part: reference(part)[2] for part in frozen.FROZEN}
    for world, (facts, whole) in worlds.items():
        for case, parameters in whole.items():
            expected, fact = references[case.split(", ")[1]], facts[0][case]
            off = torch.cat([(parameters[name].double() - expected[name]).flatten() for name in expected])
            # A momentum near the middle of two bf16 numbers is rounded to another one; 16-bit weights give other gradients.
            bounds = (1e-6, 2e-4) if case.startswith("fp32") else (2e-3, 2e-2)
            assert float(off.square().mean().sqrt()) < bounds[0], (world, case, float(off.square().mean().sqrt()))
            assert float(off.abs().max()) < bounds[1], (world, case, float(off.abs().max()))
            begun = frozen.start()
            for name in expected:
                rounded = case.startswith("masters") and name not in fact["frozen"]  # to bf16; what is frozen never is
                first = begun[name].bfloat16().float() if rounded else begun[name]
                stays = torch.equal(parameters[name], first)
                assert stays == (name in fact["frozen"]), (world, case, name)


@pytest.mark.launch
def test_a_checkpoint_holds_every_weight_and_the_state_of_what_is_trained(worlds):
    names = set(frozen.start())
    for world, (facts, _) in worlds.items():
        for case, fact in facts[0].items():
            assert set(fact["weights"]) == names, (world, case)
            assert {name.rsplit(".", 1)[0] for name in fact["state"]} == names - set(fact["frozen"]), (world, case)
