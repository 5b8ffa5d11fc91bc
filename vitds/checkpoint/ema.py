"""An exponential moving average of the weights (Polyak), kept beside the fp32 masters and cut like them.

After update number k, with masters m and the average a of the same elements:

    a_k = decay · a_{k−1} + (1 − decay) · m_k,    a_0 = m_0
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vitds import dist
from vitds.errors import Preempted, Stopped, UserError
from vitds.layout import Shard
from vitds.sections import key

CHUNK_ELEMENTS = 16 * 2**20
"""Elements that change places at once: 64 MiB of fp32."""


@dataclass(frozen=True)
class EmaSection:
    """An exponential moving average of the weights, saved with them as `model.ema`."""

    decay: float | None = key(None, "What is kept of the average at each update, as in 0.9999; unset: no average.")
    evaluate: str = key(
        "both",
        "What is evaluated where there is an average: the weights (eval/…), the average (eval_ema/…), or both.",
        choices=("weights", "ema", "both"),
    )

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise UserError(f"vitds.ema.decay: expected a number between 0 and 1, found {self.decay}")


class Ema:
    """The average of this rank's part of the masters: fp32, on the masters' device, 4 bytes a master.

    Args:
        masters: gives this rank's masters as live views, always the same ones in the same order.
        decay: between 0 and 1.
        frozen: names of masters that no update changes: each is its own average, and costs nothing.
    """

    def __init__(self, masters: Callable[[], list[Shard]], decay: float, frozen: Collection[str] = ()) -> None:
        self._masters, self.decay, self._frozen = masters, decay, frozenset(frozen)
        self._averages = [
            shard.data.detach() if shard.name in self._frozen else shard.data.detach().clone() for shard in masters()
        ]

    def shards(self) -> list[Shard]:
        """This rank's part of the average, as live views under the parameters' own names."""
        return [
            Shard(master.name, master.shape, average, master.start, master.group, master.replicated)
            for master, average in self._pairs()
        ]

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew: the average is the masters as they are."""
        for master, average in self._moving():
            average.copy_(master.data)

    @torch.no_grad()
    def update(self) -> None:
        """After each update of the masters. In place and without a temporary; every rank by itself."""
        pairs = self._moving()
        # a + (1 − decay)·(m − a): where m stays, a stays. decay·a + (1 − decay)·m would not: its two factors, rounded to
        # fp32, do not add up to 1, and at a decay of 0.9999 the average of constant weights drifts off by 2e-4 of them.
        torch._foreach_lerp_([average for _, average in pairs], [master.data for master, _ in pairs], 1 - self.decay)

    @contextmanager
    def exchanged(self, refresh: Callable[[], None]) -> Iterator[None]:
        """Within, the masters hold the average and `shards()` the masters; after it all bits are back. Collective.

        When the body raises what only this rank may know of, the masters come back, the weights the model computes with
        do not: making them follow is collective, and the other ranks are not there.

        Args:
            refresh: makes the computing weights follow the masters (`TrainingEngine.refresh_weights`); called after
                each exchange.
        """
        self._exchange()
        agreed = True
        try:
            refresh()
            yield
        except BaseException as error:
            agreed = isinstance(error, (Preempted, Stopped)) or dist.world_size() == 1
            raise
        finally:
            self._exchange()
            if agreed:
                refresh()

    @torch.no_grad()
    def _exchange(self) -> None:
        pairs = self._moving()
        longest = max((average.numel() for _, average in pairs), default=0)
        # Had before anything moves: running out of memory half way would leave neither.
        spare = {
            device: torch.empty(min(longest, CHUNK_ELEMENTS), device=device) for device in {a.device for _, a in pairs}
        }
        for master, average in pairs:
            for one, other in zip(
                master.data.detach().split(CHUNK_ELEMENTS), average.split(CHUNK_ELEMENTS), strict=True
            ):
                kept = spare[one.device][: one.numel()].copy_(one)
                one.copy_(other)
                other.copy_(kept)

    def _moving(self) -> list[tuple[Shard, torch.Tensor]]:
        return [pair for pair in self._pairs() if pair[0].name not in self._frozen]

    def _pairs(self) -> list[tuple[Shard, torch.Tensor]]:
        masters = self._masters()
        assert all(shard.data.dtype == torch.float32 for shard in masters)
        assert [shard.data.numel() for shard in masters] == [average.numel() for average in self._averages]
        return list(zip(masters, self._averages, strict=True))
