"""What is left is the least that the host and each cgroup leave, in both versions' words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vitds.host_memory import available_bytes

MEMINFO = "MemTotal:       1000 kB\nMemFree:        100 kB\nMemAvailable:    600 kB\n"
GIB = 2**30


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, sys.maxsize),
        ({"proc/meminfo": MEMINFO}, 600 * 1024),
        # Version 2: the group above is tighter than our own; file cache counts as free, what is "max" sets no limit.
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "700\n",
                "sys/fs/cgroup/job/memory.max": "1000\n",
                "sys/fs/cgroup/job/memory.current": "900\n",
                "sys/fs/cgroup/job/memory.stat": "anon 500\ninactive_file 200\nactive_file 50\nfile 300\n",
            },
            350,
        ),
        # In a container the mount is the group itself, whatever its name is outside.
        (
            {
                "proc/self/cgroup": "0::/outside\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "400\n",
            },
            600,
        ),
        # Version 1, beside an empty version 2.
        (
            {
                "proc/self/cgroup": "4:memory,cpu:/job\n0::/\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "500\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "600\n",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 30\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "600\n",
            },
            30,
        ),
        ({"proc/self/cgroup": "4:cpu:/job\n", "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5\n"}, sys.maxsize),
    ],
)
def test_available(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == expected


def test_here() -> None:
    assert 2**20 < available_bytes() < 2**60
