"""The ranks of a test's script without a launcher: one process imports what the script does, and forks them.

    forked.py RANKS SCRIPT [ARGUMENT …]

What a launcher would tell them is in their environment (not CROSS_RANK, by which they would know DeepSpeed's, and miss it).
When one fails the others are ended, as there.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path


def start(rank: int, ranks: int, script: str) -> int:
    """The process id of a rank that runs the script as it would be run by its name."""
    pid = os.fork()
    if pid:
        return pid
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in told.items()})
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(ranks: int, script: str) -> int:
    gc.disable()
    root = Path(__file__).resolve().parent.parent
    importlib.import_module(".".join(Path(script).resolve().relative_to(root).with_suffix("").parts))
    gc.enable()
    gc.freeze()  # DeepSpeed collects garbage whenever it builds an engine; what is imported is none
    left, failed = {start(rank, ranks, script) for rank in range(ranks)}, 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code if code > 0 else 1
            for other in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    _, number, name, *arguments = sys.argv
    sys.argv = [name, *arguments]
    sys.exit(main(int(number), name))
