"""Our optimizers against the float64 reference, on whole parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.optim.cases import LRS, SETTINGS, SHAPES, VIEWS, gradients, initial
from tests.optim.reference import Run, errors, full_run, reference_run
from vitds.optim import OPTIMIZERS, ModifiedAdafactor, base

CLIP = 0.5
CHUNKS = [5000, 333]
"""Of 5000 elements several heads fit one chunk, of 333 not one slab of some parameters."""
VARIANTS = [
    *[(name, {}) for name in OPTIMIZERS],
    ("ModifiedAdafactor", {"clipping_threshold": 0.5, "beta2_cap": 0.9, "beta1": 0.8984375}),
    ("ModifiedAdafactor", {"min_dim_size_to_factor": 2, "decay_rate": 0.5, "eps": 1e-12}),
    ("HalfPrecisionMomentumAdam", {"betas": (0.8, 0.95), "eps": 1e-5}),
    ("HalfPrecisionMomentumSGD", {"momentum": 0.5}),
]


def clipped(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    norm = torch.cat([g.double().flatten() for g in grads.values()]).norm()
    divisor = max(1.0, float(norm + 1e-6) / CLIP)
    return {name: (g.double() / divisor).float() for name, g in grads.items()}


def rates(name: str) -> list[float]:
    """SGD's steps are as small as the gradients; without a larger rate fp32 would not resolve the weights' movement."""
    return [lr * (1000 if "SGD" in name else 1) for lr in LRS]


def settings(name: str) -> dict[str, dict[str, float]]:
    """Decay in proportion, so that rate times decay stays below one."""
    return {n: {"weight_decay": s["weight_decay"] / (1000 if "SGD" in name else 1)} for n, s in SETTINGS.items()}


def run_whole(name: str, hyper: dict) -> dict[str, torch.Tensor]:
    params = {n: torch.nn.Parameter(value.clone()) for n, value in initial().items()}
    groups = [
        {"params": [p], "names": [n], "views": [VIEWS.get(n)], "weight_decay": settings(name)[n]["weight_decay"]}
        for n, p in params.items()
    ]
    optimizer = OPTIMIZERS[name](groups, lr=1.0, **hyper)
    for grads, lr in zip(gradients(), rates(name), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for n, g in clipped(grads).items():
            params[n].grad = g
        optimizer.step()
    return {n: p.detach() for n, p in params.items()}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_working_in_chunks_changes_rounding_only(monkeypatch, chunk):
    whole = run_whole("ModifiedAdafactor", {})
    monkeypatch.setattr(base, "CPU_CHUNK", chunk)
    for n, value in run_whole("ModifiedAdafactor", {}).items():
        off = (value - whole[n]).abs() / LRS[4]
        assert float((off > 1e-6).float().mean()) < 1e-3, f"{n}: more than a bf16 rounding here and there"
        assert float(off.max()) < 1e-2, n


@pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=str)
def test_twenty_steps_match_the_equations(name, hyper):
    run = full_run(name, initial(), VIEWS, gradients(), settings(name), CLIP, rates(name), **hyper)
    found = errors(run_whole(name, hyper), initial(), run)
    bound = 1e-5 if hyper else 3e-6  # some variants move the weights so little that fp32's own rounding shows
    worst = {n: (e.decided, e.doubtful) for n, e in found.items() if e.decided > bound or e.doubtful > 2e-2}
    assert not worst, worst
    share = sum(int(d.sum()) for d in run.doubtful.values()) / sum(d.numel() for d in run.doubtful.values())
    assert share < 0.05, f"{share:.1%} of the elements were not compared tightly"


def test_views_compute_what_the_flax_shapes_do():
    """q, k, v as (D, H, hd), out as (H, hd, D), dense kernels (in, out), convolutions HWIO: each a parameter."""
    steps = 4

    def to_flax(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for n, t in tensors.items():
            view = VIEWS.get(n, SHAPES[n])
            if n == "qkv.weight":
                out |= {f"qkv.weight/{i}": t.view(view)[i].permute(2, 0, 1).contiguous() for i in range(3)}
            elif n == "qkv.bias":
                out |= {f"qkv.bias/{i}": t.view(view)[i] for i in range(3)}
            elif n == "proj.weight":
                out[n] = t.view(view).permute(1, 2, 0).contiguous()
            elif n.startswith("patch"):
                out[n] = t.permute(2, 3, 1, 0).contiguous()
            elif n.endswith("weight"):
                out[n] = t.T.contiguous()
            else:
                out[n] = t
        return out

    torch_shapes = reference_run("ModifiedAdafactor", initial(), VIEWS, gradients(steps), {}, 0, LRS[:steps])
    flax_grads = [to_flax(g) for g in gradients(steps)]
    flax_shapes = reference_run("ModifiedAdafactor", to_flax(initial()), {}, flax_grads, {}, 0, LRS[:steps])
    for n, value in to_flax(torch_shapes).items():
        np.testing.assert_allclose(value, flax_shapes[n], rtol=0, atol=1e-12, err_msg=n)


def test_a_wrong_view_is_caught():
    """The comparison above can tell per-head factors from factors of the fused matrix."""
    run = full_run("ModifiedAdafactor", initial(), {}, gradients(), SETTINGS, CLIP, LRS)
    found = errors(run_whole("ModifiedAdafactor", {}), initial(), Run(run.values, run.doubtful))
    assert found["qkv.weight"].decided > 1e-2
    assert found["proj.weight"].decided > 1e-2
    assert found["fc1.weight"].decided < 2e-6


def test_beta2_grows_as_published():
    table = {1: 0.0, 2: 0.42565, 3: 0.58476, 10: 0.84151, 100: 0.97488, 1000: 0.99602, 5623: 0.999, 5624: 0.999}
    optimizer = ModifiedAdafactor([torch.nn.Parameter(torch.zeros(1))])
    assert {t: round(optimizer.beta2(t), 5) for t in table} == table
    assert optimizer.beta2(5623) < 0.999 == optimizer.beta2(5624) == optimizer.beta2(10**6)
    assert ModifiedAdafactor([torch.nn.Parameter(torch.zeros(1))], beta2_cap=0.95).beta2(10**6) == 0.95


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(64, 48), (5,), (1, 40, 50)], ids=str)
def test_zero_gradients_move_nothing_and_what_follows_is_finite(name, shape):
    """A zero-initialised classifier gives the trunk exact zeros at the first steps; later some rows may stay zero."""
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = OPTIMIZERS[name]([p], lr=1e-3)
    for _ in range(3):
        p.grad = torch.zeros(shape)
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(shape))
    p.grad = torch.zeros(shape)
    p.grad.view(-1)[1] = 1e-3
    for _ in range(3):
        optimizer.step()
    assert p.isfinite().all()
    assert p.detach().view(-1)[1] < 1
