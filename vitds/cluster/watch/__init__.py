"""Whether ranks get on: hangs, deaths and slow ranks are noticed, blamed and told."""

from vitds.cluster.watch.stragglers import Stragglers
from vitds.cluster.watch.watching import Watch

__all__ = ["Stragglers", "Watch"]
