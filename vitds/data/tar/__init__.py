"""Tar shards as a source of images: their members, their indices, reading by offset."""

from vitds.data.tar.index import index_path, write_index
from vitds.data.tar.source import Tar

__all__ = ["Tar", "index_path", "write_index"]
