"""Checkpoints: directories of plain safetensors and JSON, whole or not there, readable on any number of ranks."""

from vitds.checkpoint.exchange.weights import WeightsFile
from vitds.checkpoint.load import Checkpoint, newest_checkpoint, open_checkpoint
from vitds.checkpoint.retention import CheckpointSection, finish_deletions, prune, remove_leftovers
from vitds.checkpoint.save import Saved, Saver, write_bandwidth

__all__ = [
    "Checkpoint",
    "CheckpointSection",
    "Saved",
    "Saver",
    "WeightsFile",
    "finish_deletions",
    "newest_checkpoint",
    "open_checkpoint",
    "prune",
    "remove_leftovers",
    "write_bandwidth",
]
