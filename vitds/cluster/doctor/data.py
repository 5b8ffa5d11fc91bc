"""What there is at a path of the run file, to be compared with what other hosts have.

Standard library only, and run alone (vitds/cluster/doctor/probe.py), as is vitds/shards.py from here: to import all of vitds
would take seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import time
from pathlib import Path
from typing import Any

MOST_ENTRIES = 2000
_INDEX = ".index.safetensors"
"""The index of a tar (vitds/data/tar/index.py), which a host may have made already and another not."""
_PATTERN = r"::|[{*?\[]"


def digest_of_data(path: str, seconds: float = 5.0) -> dict[str, Any]:
    """{digest, entries}, {error}, or {slow} where it cannot be told, or not within `seconds`: of a directory, or of the
    tar shards that a pattern means, the names and the sizes of the first files among them, of a file its size."""
    started, path = time.monotonic(), os.path.expanduser(path)
    found = hashlib.sha256()
    try:
        if os.path.isfile(path):
            return {"digest": f"{os.path.getsize(path)} bytes", "entries": 1}
        if re.search(_PATTERN, path) and not os.path.exists(path):
            shards = Path(__file__).parents[2] / "shards.py"
            names = runpy.run_path(str(shards))["find_shards"](path)
        else:
            names = sorted(name for name in os.listdir(path) if _INDEX not in name)
        for i, name in enumerate(names):
            found.update(os.path.basename(name).encode(errors="surrogateescape") + b"\0")
            if i < MOST_ENTRIES:
                about = os.stat(os.path.join(path, name))
                if not os.path.isdir(os.path.join(path, name)):
                    found.update(b"%d\0" % about.st_size)
                if time.monotonic() - started > seconds:
                    return {"slow": f"{path}: {i + 1} of {len(names)} entries took {seconds:.0f} s"}
    except OSError as error:
        return {"error": f"{path}: {error.strerror}"}
    except ValueError as error:
        return {"error": f"{os.path.dirname(re.split(_PATTERN, path)[0])}: {error}"}
    return {"digest": found.hexdigest()[:12], "entries": len(names)}
