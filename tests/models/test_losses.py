"""The losses against their equations and recorded values."""

import numpy as np
import pytest
import torch

from vitds.models import LOSSES, ViTConfig, ViTForImageClassification

LOGITS = torch.tensor([[2.0, -30.0, 0.5, 80.0], [-1.0, 0.0, 4.0, -90.0], [0.1, 0.2, 0.3, 0.4]])
SOFT = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75], [1.0, 0.0, 0.0, 0.0]])


def test_sigmoid_at_the_start_of_jft() -> None:
    """Zero kernel, bias −10, 29,593 classes; recorded from the authors' code."""
    logits = torch.full((2, 29593), -10.0)
    one = torch.tensor([5, 29592])
    three = torch.zeros(2, 29593)
    three[:, [1, 2, 3]] = 1
    assert LOSSES["sigmoid"](logits, one).item() == pytest.approx(11.3435, abs=1e-4)
    assert LOSSES["sigmoid"](logits, three).item() == pytest.approx(31.3435, abs=1e-4)
    assert LOSSES["sigmoid"](logits * 0, one).item() == pytest.approx(29593 * np.log(2), rel=1e-6)


def test_sigmoid_is_a_sum_over_classes_and_a_mean_over_images() -> None:
    z, y = LOGITS.double().numpy(), SOFT.double().numpy()
    expected = (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)).sum(1).mean()
    assert LOSSES["sigmoid"](LOGITS, SOFT).item() == pytest.approx(expected, rel=1e-6)


def test_softmax() -> None:
    z, y = LOGITS.double().numpy(), SOFT.double().numpy()
    expected = -(y * (z - np.logaddexp.reduce(z, axis=1, keepdims=True))).sum(1).mean()
    assert LOSSES["softmax"](LOGITS, SOFT).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_forms_of_labels_agree(name: str) -> None:
    numbers = torch.tensor([3, 0, 2])
    rows = torch.nn.functional.one_hot(numbers, 4)
    expected = LOSSES[name](LOGITS, numbers)
    torch.testing.assert_close(LOSSES[name](LOGITS, rows), expected)
    torch.testing.assert_close(LOSSES[name](LOGITS, rows.float()), expected)
    assert LOSSES[name](LOGITS.bfloat16(), rows.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    """σ(z) − y, or softmax(z) − y, over the batch size."""
    logits = LOGITS.clone().requires_grad_()
    LOSSES[name](logits, SOFT).backward()
    chances = torch.sigmoid(LOGITS) if name == "sigmoid" else torch.softmax(LOGITS, dim=1)
    torch.testing.assert_close(logits.grad, (chances - SOFT) / 3)


def test_models_use_the_loss_they_name() -> None:
    for name, loss in LOSSES.items():
        config = ViTConfig(
            width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=4, image_size=8, num_classes=4, loss=name
        )
        model = ViTForImageClassification(config)
        torch.nn.init.normal_(model.head.weight)
        images, labels = torch.rand(3, 3, 8, 8) * 2 - 1, torch.tensor([3, 0, 2])
        output = model(images, labels=labels)
        assert torch.equal(output.loss, loss(output.logits, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["numbers", "multi-hot", "soft"])
def test_sigmoid_against_its_formula_differentiated_by_torch(form: str, dtype: torch.dtype) -> None:
    """From −90 to 90, beyond where exp overflows in fp32 and where softplus becomes its argument."""
    logits = torch.linspace(-90, 90, 4 * 37, dtype=torch.float64)[torch.randperm(4 * 37)].view(4, 37)
    labels = torch.tensor([0, 36, 5, 17])
    rows = {"multi-hot": (torch.rand(4, 37) < 0.2).long(), "soft": torch.rand(4, 37)}.get(form)
    targets = torch.nn.functional.one_hot(labels, 37) if rows is None else rows
    exact, ours = logits.clone().requires_grad_(), logits.to(dtype).requires_grad_()
    y, log_sigmoid = targets.double(), torch.nn.functional.logsigmoid
    expected = -(y * log_sigmoid(exact) + (1 - y) * log_sigmoid(-exact)).sum(1).mean()
    found = LOSSES["sigmoid"](ours, labels if rows is None else rows)
    expected.backward()
    (3 * found).backward()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(ours.grad.double() / 3, exact.grad, rtol=tolerance, atol=tolerance / 10)


def test_sigmoid_keeps_nothing_but_its_arguments() -> None:
    logits, kept = torch.randn(8, 1000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda t: t):
        LOSSES["sigmoid"](logits, torch.arange(8))
    assert kept.count(logits.data_ptr()) == 1 and len(kept) == 2
