"""What lies below everything that is trained: no backward pass goes there and nothing is kept for one."""

from __future__ import annotations

import pytest
import torch

from tests.live_memory import live_memory
from vitds.models import ModelSection, ViTForImageClassification, build_config

DEPTH, FROZEN = 4, 3
MODEL = ModelSection(
    width=64, depth=DEPTH, mlp_dim=128, num_heads=2, patch_size=2, image_size=16, num_classes=5, loss="softmax"
)
BELOW = ("patch_embed.", "pos_embed", *(f"blocks.{i}." for i in range(FROZEN)))
POLICIES = ("none", "full", "every:2", "selective")


def built(policy: str, frozen: tuple[str, ...], compiled: bool) -> ViTForImageClassification:
    """On a model with no zeros in it: a classifier at zero would let no gradient pass."""
    model = ViTForImageClassification(build_config(MODEL))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.copy_(model.initial_tensor(name, 0) + 0.02 * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(not name.startswith(frozen))
    model.set_activation_checkpointing(policy)
    if compiled:
        model.compile_blocks(backend="aot_eager")
    return model


def passes(model: ViTForImageClassification, limit: int = DEPTH) -> tuple[dict[str, torch.Tensor], int, list[bool]]:
    """Gradients by name, bytes that the forward pass keeps, and whether each block's result has a gradient."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator)
    reached: list[bool] = []
    hooks = [
        block.register_forward_hook(lambda *given: reached.append(given[2].requires_grad)) for block in model.blocks
    ]
    model(images, labels=labels).loss.backward()  # what is compiled is compiled here
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    with live_memory() as seen:
        loss = model(images, labels=labels).loss
        kept = seen.now
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept, reached


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_backward_pass_goes_below_what_is_trained(policy, compiled):
    whole, kept_of_all, _ = passes(built(policy, (), compiled))
    gradients, kept, reached = passes(built(policy, BELOW, compiled))
    assert reached == [False] * FROZEN + [True]
    assert gradients.keys() == {name for name in whole if not name.startswith(BELOW)}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-7, msg=name)
    _, kept_of_one, _ = passes(built("none", (*BELOW, "blocks.3."), compiled))
    # Of four blocks one is left, which keeps no more than one does that keeps everything.
    blocks = kept_of_all - kept_of_one
    assert kept - kept_of_one <= (blocks / DEPTH if policy in ("none", "selective") else blocks) + 2**14, (
        kept,
        kept_of_one,
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_of_a_frozen_trunk_nothing_is_kept(policy):
    """Neither blocks nor pooling: a few hundred bytes an image, and no more while a frozen block runs than without a policy."""
    trunk = (*BELOW, "blocks.3.", "norm.", "attn_pool.")
    model = built(policy, trunk, False)
    gradients, kept, reached = passes(model)
    assert gradients.keys() == {"head.weight", "head.bias"}
    assert not any(reached)
    assert kept < 4 * (64 + 4 * 5) * 4 + 1024, kept
    peaks = []
    for each in (model, built("none", trunk, False)):
        with live_memory() as seen:
            loss = each(torch.zeros(4, 3, 16, 16), labels=torch.zeros(4, dtype=torch.long)).loss
            peaks.append(seen.peak)
            del loss
    assert peaks[0] == peaks[1]
