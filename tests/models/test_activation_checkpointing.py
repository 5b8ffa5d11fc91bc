"""What is kept for the backward pass changes memory, never numbers."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from tests.models.test_forward import pictures, scrambled, small
from vitds.errors import UserError
from vitds.models import ViTForImageClassification

Result = tuple[torch.Tensor, dict[str, torch.Tensor], int]


def step(model: ViTForImageClassification) -> Result:
    """Loss, gradients, and the elements autograd kept for the backward pass."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(pictures(), labels=torch.tensor([1, 4])).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, kept


def same(a: Result, b: Result) -> None:
    assert torch.equal(a[0], b[0])
    for name, gradient in a[1].items():
        assert torch.equal(gradient, b[1][name]), name


def test_policies_agree_to_the_bit() -> None:
    model = scrambled(small("map", depth=3))
    plain = step(model)
    kept = {"none": plain[2]}
    for policy in ("full", "every:2", "selective"):
        model.set_activation_checkpointing(policy)
        result = step(model)
        same(plain, result)
        kept[policy] = result[2]
    assert kept["full"] < kept["every:2"] < kept["none"]
    assert kept["selective"] < kept["none"]
    model.set_activation_checkpointing("every:2")
    assert [block.recompute for block in model.blocks] == ["full", "none", "full"]


def test_selective_does_not_repeat_matrix_products() -> None:
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: dict[str, int] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls[func.__name__] = self.calls.get(func.__name__, 0) + 1
            return func(*args, **(kwargs or {}))

    def calls(policy: str) -> dict[str, int]:
        model = scrambled(small("gap"))
        model.set_activation_checkpointing(policy)
        with Count() as counted:
            step(model)
        return counted.calls

    none, selective, full = calls("none"), calls("selective"), calls("full")
    attention = "_scaled_dot_product_flash_attention_for_cpu.default"
    assert none["addmm.default"] == selective["addmm.default"] < full["addmm.default"]
    assert none[attention] == selective[attention] < full[attention]
    assert none["gelu.default"] < selective["gelu.default"]


def test_selective_is_right_where_linear_sums_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed puts such a linear in F.linear's place under ZeRO-3; keeping its product would add the bias twice."""

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(context, x, weight, bias):  # type: ignore[no-untyped-def]
            context.save_for_backward(x, weight)
            y = x.matmul(weight.t())
            y += bias
            return y

        @staticmethod
        def backward(context, gradient):  # type: ignore[no-untyped-def]
            x, weight = context.saved_tensors
            flat = gradient.flatten(0, -2)
            return gradient @ weight, flat.t() @ x.flatten(0, -2), flat.sum(0)

    monkeypatch.setattr(F, "linear", InPlace.apply)
    model = scrambled(small("gap"))
    plain = step(model)
    model.set_activation_checkpointing("selective")
    same(plain, step(model))


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_compiled_blocks_agree(policy: str) -> None:
    torch._dynamo.reset()
    plain = step(scrambled(small("map", depth=3)))
    model = scrambled(small("map", depth=3))
    model.set_activation_checkpointing(policy)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    result = step(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1, "all blocks share one graph"
    torch.testing.assert_close(result[0], plain[0])
    assert result[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(result[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["all", "every:0", "every:", "every:x", "every:-1", "Full"])
def test_unknown_policies(policy: str) -> None:
    with pytest.raises(UserError, match=r"activation_checkpointing.*allowed: none, full, every:N"):
        scrambled(small("gap")).set_activation_checkpointing(policy)
