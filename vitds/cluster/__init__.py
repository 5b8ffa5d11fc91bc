"""Around the ranks of a run: their hosts, what becomes of them, and what a batch system or a terminal does to them."""

from vitds.cluster.preflight import early_checks, preflight
from vitds.cluster.stragglers import Stragglers
from vitds.cluster.watch import Watch

__all__ = ["Stragglers", "Watch", "early_checks", "preflight"]
