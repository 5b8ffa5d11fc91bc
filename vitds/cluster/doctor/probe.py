"""What one host is like, as facts. Standard library only.

The doctor pipes this file, with a call of `main` added, into `python -` on each host: there vitds may be missing, and
that is then one of the facts. The trainer imports it (vitds/cluster/preflight.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "vitds-probe "
"""Starts each line that is an answer: what a login prints besides is passed over."""
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy", "vitds")
SHARED_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "DS_ACCELERATOR")
LOCK_IDLE_SECONDS = 600.0
"""A build that has changed nothing for this long is over, wherever it ran: DeepSpeed's longest file takes a few minutes."""
LEFTOVERS = "deepspeed_allreduce_buffer_"
"""Name of the shared memory, 69 MB a rank, that DeepSpeed's CPU all-reduce leaves in /dev/shm."""
_LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
_HOSTS_OWN_PID_SPACE = 0xEFFFFFFC
"""Inode of the namespace in which every process of the machine is seen."""


def main(request: Mapping[str, Any]) -> None:
    """Answer one request on standard output, as JSON lines that start with `MARK`; ends within `limit` seconds."""
    signal.alarm(max(1, int(request["limit"])))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.path[:] = [place for place in sys.path if place]  # a script does not look where it is started
    if "remove" in request:
        for path in request["remove"]:
            with suppress(OSError):
                os.unlink(path)
        row: dict[str, Any] = {"removed": True}
    elif "look" in request:
        row = {"seen": look(request["look"], request["patience"])}
    else:
        # At once: the difference from the asker's clock is measured by it.
        print(MARK + json.dumps({"time": time.time()}), flush=True)
        row = facts(request)
    print(MARK + json.dumps(row), flush=True)


def facts(request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about this host that could keep it from training with the others."""
    return {
        **identity(),
        "python": [platform.python_version(), sys.executable],
        "packages": {name: version(name) for name in PACKAGES},
        "sources": sources(),
        "config": digest_of_file(request["config"]) if request["config"] else None,
        "accelerators": accelerators(request["limit"] / 2),
        "port": port_state(request["port"]) if request["port"] else None,
        "addresses": host_addresses(),
        "interfaces": interfaces(),
        "own_address": own_address(),
        "routes": {name: route(name) for name in request["peers"]},
        "environ": {name: os.environ[name] for name in SHARED_VARIABLES if name in os.environ},
        "limits": limits(),
        "shm": shared_memory(),
        "locks": [lock if not request["fix"] else remove_if_stale(lock) for lock in jit_locks()],
        "output": leave_token(request["output"], request["token"]) if request["output"] else None,
        "data": {key: digest_of_data(path) for key, path in request["data"].items()},
    }


def identity() -> dict[str, Any]:
    """What tells this host from all others: two names may lead to one machine, and two containers share a kernel."""
    boot = network = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = os.readlink("/proc/self/ns/net")
    return {"hostname": socket.gethostname(), "machine": f"{boot} {network}"}


def version(package: str) -> str | None:
    """The installed version of a package, or None; a checkout on PYTHONPATH has none."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def sources() -> dict[str, str] | None:
    """{from, digest} of the vitds that `import vitds` would give, or None."""
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("vitds")
        if spec is not None and spec.origin is not None:
            return {"from": str(Path(spec.origin).parent), "digest": digest_of_sources(Path(spec.origin).parent)}
    return None


def digest_of_sources(package: Path) -> str:
    """One digest of the names and contents of a package's Python files."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def digest_of_file(path: str) -> str:
    """A digest of a file's bytes, or why there is none, with a colon in it."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        return f"{path}: {error.strerror}"


def digest_of_data(path: str) -> dict[str, Any]:
    """As vitds/cluster/doctor/data.py has it, of the vitds that is here."""
    package = sources()
    if package is None:
        return {"slow": f"{path}: there is no vitds that would read it"}
    return runpy.run_path(f"{package['from']}/cluster/doctor/data.py")["digest_of_data"](path)


def accelerators(seconds: float) -> dict[str, Any]:
    """{kind, count} or {kind, error}; on the CPU the count is that of the cores this process may use."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return {"kind": "cpu", "count": len(os.sched_getaffinity(0))}
    try:  # in a child process, for a driver in trouble may hang
        asked = subprocess.run(
            [sys.executable, "-c", "import torch; print('count', torch.cuda.device_count())"],
            capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"kind": "cuda", "error": f"torch.cuda.device_count() did not return within {seconds:.0f} s"}
    words = asked.stdout.split()
    if asked.returncode or words[-2:-1] != ["count"]:
        return {"kind": "cuda", "error": (asked.stderr.strip().splitlines() or ["no answer"])[-1]}
    return {"kind": "cuda", "count": int(words[-1])}


def port_state(port: int) -> str | None:
    """None if this host may listen on the port, otherwise why not."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return str(error.strerror)
    return None


def host_addresses() -> list[str]:
    """What `hostname -I` prints: DeepSpeed takes the first of the first host as the master's address."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5).stdout.split()
    return []


def interfaces() -> dict[str, list[str]]:
    """The network interfaces that are up: {name: [IPv4 address]}."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            found[name] = []
            with suppress(OSError):
                asked = fcntl.ioctl(any_socket, 0x8915, struct.pack("256s", name[:15].encode()))  # SIOCGIFADDR
                found[name].append(socket.inet_ntoa(asked[20:24]))
    return found


def own_address() -> str:
    """What this host's own name means to itself: gloo listens there unless it is told an interface."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def route(name: str) -> list[str]:
    """[address of the other host, own address on the way to it], or [] if the name cannot be resolved or reached."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        address = socket.gethostbyname(name)
        probe.connect((address, 9))  # sends nothing
        return [address, probe.getsockname()[0]]
    return []


def limits() -> dict[str, Any]:
    """Soft limits of this process: open files, locked memory in bytes (-1: none); and whether there is InfiniBand."""
    return {
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
    }


def shared_memory(directory: str = "/dev/shm") -> dict[str, Any]:
    """{size, free} of /dev/shm in bytes, and {leftovers: paths, left: bytes} that no living process of ours maps."""
    try:
        about = os.statvfs(directory)
        names = {name for name in os.listdir(directory) if name.startswith(LEFTOVERS)}
        if names:
            names -= _mapped(names)
        paths = [os.path.join(directory, name) for name in sorted(names)]
        left = sum(os.stat(path).st_blocks * 512 for path in paths)
    except OSError as error:
        return {"error": f"{directory}: {error.strerror}"}
    return {
        "size": about.f_blocks * about.f_frsize, "free": about.f_bavail * about.f_frsize, "leftovers": paths, "left": left,
    }  # fmt: skip


def _mapped(names: set[str]) -> set[str]:
    found: set[str] = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            found |= {line.rsplit("/", 1)[-1] for line in Path("/proc", entry, "maps").read_text().splitlines()} & names
    return found


def jit_locks() -> list[dict[str, Any]]:
    """The locks of extensions under construction: {path, idle: seconds, holder: a living process's id or None}."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = list(Path(given).glob("*/lock")) if given else list(Path(cache, "torch_extensions").glob("*/*/lock"))
    found = []
    for path in places:
        with suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in [path, *path.parent.iterdir()])
            found.append({"path": str(path), "idle": max(0.0, time.time() - newest), "holder": holder_of(path)})
    return found


def holder_of(path: Path) -> int | None:
    """A process of this host that holds the file open, as the builder of an extension holds its lock."""
    about = path.stat()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            for opened in os.scandir(f"/proc/{entry}/fd"):
                with suppress(OSError):
                    other = os.stat(opened.path)
                    if (other.st_dev, other.st_ino) == (about.st_dev, about.st_ino):
                        return int(entry)
    return None


def remove_if_stale(lock: dict[str, Any]) -> dict[str, Any]:
    """Remove a lock whose owner cannot be alive; adds {removed} to it, also where another host has done so.

    One remover at a time; and two looks, for a builder closes its lock a moment before it removes it.
    """
    path = Path(lock["path"])
    with suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            before = path.stat().st_ino
            time.sleep(0.1)
            alone = lock["idle"] > LOCK_IDLE_SECONDS or _only_ours(path)
            if alone and holder_of(path) is None and path.stat().st_ino == before:
                path.unlink()
        finally:
            os.close(directory)
    return {**lock, "removed": not path.exists()}


def _only_ours(path: Path) -> bool:
    """Whether every process that can reach this file is seen from here: not on a file server, not in a container."""
    if os.stat("/proc/self/ns/pid").st_ino != _HOSTS_OWN_PID_SPACE or os.stat(path).st_uid != os.geteuid():
        return False
    device = os.stat(path).st_dev
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = [words[words.index("-") + 1] for words in mounts if words[2] == f"{os.major(device)}:{os.minor(device)}"]
    return bool(kinds) and kinds[-1] in _LOCAL_DISKS


def leave_token(directory: str, token: str) -> dict[str, Any]:
    """{directory, path}: an empty file of this name, in the directory or, until a run has made it, the nearest above
    it; {directory, error} where that cannot be."""
    wanted = Path(directory).absolute()
    place = next(place for place in (wanted, *wanted.parents) if place.exists())
    try:
        (place / token).touch(exist_ok=False)
    except OSError as error:
        return {"directory": str(place), "error": str(error.strerror)}
    return {"directory": str(place), "path": str(place / token)}


def look(paths: Sequence[str], patience: float) -> list[str]:
    """Those of the files that are seen here; file servers are given `patience` seconds to show them."""
    deadline = time.monotonic() + patience
    while True:
        seen = [path for path in paths if os.path.exists(path)]
        if len(seen) == len(paths) or time.monotonic() > deadline:
            return seen
        time.sleep(0.2)


def _end_with_parent() -> None:
    """End this process when the ssh session that started it has ended: nobody waits for its answer any more."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
