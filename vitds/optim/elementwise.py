"""Whether ZeRO would silently change what a foreign optimizer computes."""

from __future__ import annotations

from typing import Any

import torch

from vitds.errors import UserError


def assert_elementwise(cls: Any, params: dict[str, Any]) -> None:
    """Steps a (4, 4) parameter whole and as two flat pieces (8,), with the same gradients, and compares.

    Args:
        cls: an optimizer class, built as cls(parameters, **params).
        params: its settings, as the run will use them.

    Raises:
        UserError: the pieces move otherwise than the whole; the class cannot step flat pieces at all; it keeps state
            that is neither a number nor of the parameter's shape, which could not be saved from a piece.
    """
    name = f"optimizer.type: {cls.__name__}"
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(4, 4, generator=generator)
    # sizes differ from row to row, so that whatever is shared across elements shows
    gradients = [torch.randn(4, 4, generator=generator) * torch.tensor([[0.1], [1.0], [10.0], [3.0]]) for _ in range(3)]
    whole = [torch.nn.Parameter(initial.clone())]
    pieces = [torch.nn.Parameter(piece.clone()) for piece in initial.flatten().split(8)]
    for parameters in (whole, pieces):
        try:
            optimizer = cls(parameters, **params)
            for gradient in gradients:
                for parameter, part in zip(parameters, gradient.flatten().split(parameters[0].numel()), strict=True):
                    parameter.grad = part.clone().view_as(parameter)
                optimizer.step()
        except Exception as error:  # whatever a foreign class raises, the user needs to know which step it was
            shape = tuple(parameters[0].shape)
            raise UserError(f"{name} cannot step a parameter of shape {shape} from its gradient: {error}") from error
        for parameter in parameters:
            for key, value in optimizer.state[parameter].items():
                if torch.is_tensor(value) and value.numel() != 1 and value.shape != parameter.shape:
                    raise UserError(
                        f"{name} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}: it is not elementwise, and its state cannot be cut over ranks; "
                        "derive it from vitds.optim.LayoutOptimizer"
                    )
    moved_whole = (whole[0].detach() - initial).flatten()
    moved_pieces = torch.cat([piece.detach() for piece in pieces]) - initial.flatten()
    if not torch.allclose(moved_whole, moved_pieces, rtol=1e-4, atol=1e-6 * float(moved_whole.abs().max())):
        raise UserError(
            f"{name} is not elementwise: under ZeRO it sees flat pieces of the parameters and computes something else; "
            "use zero_optimization.stage 0, or derive it from vitds.optim.LayoutOptimizer"
        )
