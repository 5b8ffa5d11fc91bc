"""Checkpoints: directories of plain safetensors and JSON, whole or not there, readable on any number of ranks."""

from vitds.checkpoint.load import Checkpoint, WeightsFile, newest_checkpoint, open_checkpoint
from vitds.checkpoint.retention import CheckpointSection, prune, remove_leftovers
from vitds.checkpoint.save import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointSection",
    "WeightsFile",
    "newest_checkpoint",
    "open_checkpoint",
    "prune",
    "remove_leftovers",
    "save_checkpoint",
]
