"""DeepSpeed, and what must be known about it: the only room that imports it."""

from vitds.zero.engine import TrainingEngine, precision
from vitds.zero.joining import init_distributed, refusals_shared
from vitds.zero.observe import observed
from vitds.zero.replay import explain

__all__ = ["TrainingEngine", "explain", "init_distributed", "observed", "precision", "refusals_shared"]
