"""matplotlib, for whom it is installed."""

from __future__ import annotations

import importlib
from typing import Any

from vitds.errors import UserError


def plots(argument: str, module: str = "figure") -> Any:
    """A module of matplotlib's.

    Args:
        argument: that asks for a picture, for the message.
        module: its name in matplotlib.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise UserError(f"{argument}: matplotlib cannot be imported ({error}); pip install 'vitds[plots]'") from None
