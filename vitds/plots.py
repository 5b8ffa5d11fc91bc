"""matplotlib, for whom it is installed."""

from __future__ import annotations

from typing import Any

from vitds.errors import UserError


def plots(argument: str) -> Any:
    """matplotlib's figures.

    Args:
        argument: that asks for a picture, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise UserError(f"{argument}: matplotlib cannot be imported ({error}); pip install 'vitds[plots]'") from None
    return figure
