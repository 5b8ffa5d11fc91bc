"""The one owner of a directory, as a small file that its owner renews.

The file is created exclusively (O_EXCL), which also holds on network file systems, and says who owns the directory. An
owner whose process is gone from this machine is succeeded at once; one on another machine when it has given no sign for
60 seconds. Clocks of machines that share a directory must agree to well within that.

An owner that cannot read its file, because the file server is away, still owns the directory: it has lost it when the
file names another, or is missing after a silence that was long enough for another to come and go.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from vitds.errors import UserError
from vitds.json_files import say

RENEW_SECONDS = 5.0
STALE_SECONDS = 60.0
UNREADABLE_SECONDS = 3 * RENEW_SECONDS
"""A file that nobody can read is left alone so long: an owner who is alive would have renewed it."""
WAIT_FOR_LIVING_SECONDS = 15.0
WAIT_FOR_SILENT_SECONDS = STALE_SECONDS + WAIT_FOR_LIVING_SECONDS
POLL_SECONDS = 0.1


class Place:
    """A directory, told from the bare mount point that takes its name when the file system has gone.

    Args:
        path: the directory; what is there now, or at the first `check`, is the true one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[int, int] | None = None
        self.settle()

    def settle(self) -> None:
        """What is there now is the true one; for the rest of this process `place_of` knows it."""
        _places[os.path.abspath(self.path)] = self
        with contextlib.suppress(OSError):
            self._known = self._identity()

    def check(self) -> None:
        """Raises OSError when the directory has vanished. A run's own, with its config.json, may come back renumbered."""
        try:
            found = self._identity()
        except (FileNotFoundError, NotADirectoryError):
            raise OSError(f"the directory {self.path} has vanished") from None
        self._known = self._known or found
        if found != self._known and not (self.path / "config.json").is_file():
            raise OSError(f"the directory {self.path} has vanished, and another one is in its place")

    def _identity(self) -> tuple[int, int]:
        entry = os.stat(f"{self.path}/")
        return entry.st_dev, entry.st_ino


_places: dict[str, Place] = {}


def place_of(path: Path) -> Place | None:
    """The directory that this process has had there, if it has had one."""
    return _places.get(os.path.abspath(path))


class Lease:
    """Ownership of a directory through the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token: str | None = None
        """Of this job: its rank 0 draws it in `acquire`, others are told."""
        self._place = Place(path.parent)
        self._me: dict[str, Any] = {}
        self._renewed = 0.0
        self._lost_to: str | None = None
        self._over = threading.Event()
        self._renewal: threading.Thread | None = None

    def acquire(self, wait_seconds: float | None = None) -> None:
        """Become the owner, waiting for another one as long as `RunDirectory.acquire` says.

        Raises:
            UserError: another process owns the directory.
        """
        assert self._renewal is None, "acquired twice"
        pid = os.getpid()
        self.token = uuid.uuid4().hex
        self._me = {"host": socket.gethostname(), "pid": pid, "token": self.token}
        self._me |= {"machine": _machine(), "started": _started(pid)}
        first_times: dict[Any, Any] = {}
        began, told = time.monotonic(), False
        while not self._create(self.path):
            text = _read(self.path)
            if text is None:
                continue
            holder = _parse(text)
            if self._is_gone(self.path, holder) and self._removed(text):
                continue
            # A second time in one owner's lease is a sign of life.
            renewed = holder.get("time") != first_times.setdefault(holder.get("token"), holder.get("time"))
            alive = renewed or _is_here(holder)
            patience = wait_seconds
            if patience is None:
                patience = WAIT_FOR_LIVING_SECONDS if alive else WAIT_FOR_SILENT_SECONDS
            if time.monotonic() - began >= patience:
                raise UserError(
                    f"{self.path.parent} is in use by {_named(holder)}; stop that run, or take another --output-dir. "
                    f"({self.path} is left behind only by a host that died; it runs out after {STALE_SECONDS:.0f} s.)"
                )
            if not told:
                say(f"vitds: {self.path.parent} is in use by {_named(holder)}; waiting")
                told = True
            time.sleep(POLL_SECONDS)
        self._place.settle()
        self._renewed = time.time()
        self._over.clear()
        self._renewal = threading.Thread(target=self._renew_until_over, name="lease", daemon=True)
        self._renewal.start()

    def release(self) -> None:
        """Stop renewing and remove the file, if it is still ours; where that is impossible, it is said."""
        if self._renewal is None:
            return
        self._over.set()
        self._renewal.join()
        self._renewal = None
        if not self.is_ours():
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            say(f"vitds: {self.path} cannot be removed ({error}); it counts no more once this process has ended")

    def is_ours(self) -> bool:
        """Whether the file, as it is now, names this job; for any rank that knows the token.

        Of a file that nobody can read its owner believes what it knew last, the other ranks that it is not ours.
        """
        holder: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            holder = _parse(_read(self.path) or b"")
        if holder:
            return self.token is not None and holder.get("token") == self.token
        fresh = time.time() - self._renewed <= STALE_SECONDS  # or another may have come and gone
        return self._renewal is not None and self._lost_to is None and fresh

    def check(self) -> None:
        """Raises RuntimeError when the lease was acquired and has since passed to another run."""
        if self._lost_to is not None:
            raise RuntimeError(
                f"{self.path.parent} now belongs to {self._lost_to}; this run must not write to it any more"
            )

    def _renew_until_over(self) -> None:
        troubled = False
        while not self._over.wait(RENEW_SECONDS):
            try:
                self._lost_to = self._renew()
                self._renewed = time.time()
            except OSError as error:  # A file server that is away for a moment; the next renewal tries again.
                if not troubled:
                    say(f"vitds: {self.path} cannot be renewed ({error}); going on, and trying again")
                troubled = True
                continue
            if self._lost_to is not None:
                return
            if troubled:
                say(f"vitds: {self.path} is renewed again")
            troubled = False

    def _renew(self) -> str | None:
        """Write the time into the file, and the file if it is missing. Returns the owner if that is another by now.

        Raises:
            OSError: it cannot be read or written, or the directory has vanished: nobody is known to own it.
        """
        text = _read(self.path)
        holder = _parse(text or b"")
        if holder:
            if holder.get("token") != self.token:
                return _named(holder)
            self._replace()
            return None
        self._place.check()
        if text is None and time.time() - self._renewed > STALE_SECONDS:
            return "another run, which took it while this one gave no sign, and has ended"
        # Exclusively, as in `acquire`: a successor may be at it just now, and the next renewal sees who it was.
        if text is not None and not (self._is_gone(self.path, holder) and self._removed(text)):
            raise OSError("its text cannot be read")
        self._create(self.path)
        return None

    def _create(self, path: Path) -> bool:
        """Write our name into a new file; False if there is a file."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._text())
        except OSError:
            with contextlib.suppress(OSError):  # or nobody could tell whose it is
                path.unlink(missing_ok=True)
            raise
        return True

    def _replace(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{self.token}.tmp")
        try:
            temporary.write_bytes(self._text())
            os.replace(temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _text(self) -> bytes:
        return json.dumps({**self._me, "time": time.time()}).encode() + b"\n"

    def _is_gone(self, path: Path, holder: dict[str, Any]) -> bool:
        if not holder:
            try:
                return time.time() - path.stat().st_mtime > UNREADABLE_SECONDS
            except FileNotFoundError:
                return False
        if _same_machine(holder):
            return not _is_here(holder)
        return time.time() - holder["time"] > STALE_SECONDS

    def _removed(self, gone: bytes) -> bool:
        """Remove the file of an owner that is gone; False if another process is about to.

        One process at a time gets to do it, and only while the file still says what was judged: otherwise a slow one
        could remove the lease of a quick one.
        """
        turn = self.path.with_name(f"{self.path.name}.succession")
        if not self._create(turn):
            text = _read(turn)
            if text is not None and self._is_gone(turn, _parse(text)):
                turn.unlink(missing_ok=True)
            return False
        try:
            if _read(self.path) == gone:
                self.path.unlink(missing_ok=True)
        finally:
            turn.unlink(missing_ok=True)
        return True


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(text: bytes | str) -> dict[str, Any]:
    """Host, pid and time, and what else the owner wrote; {} for a torn file."""
    try:
        holder = json.loads(text)
        return holder | {"host": str(holder["host"]), "pid": int(holder["pid"]), "time": float(holder["time"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _machine() -> str | None:
    """This boot and pid namespace: containers may share a host name, but not what a pid means. None without /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks after boot, which tells it from a later one of the same number.

    None where /proc does not say; −1 for a process that has ended and only waits for its parent to notice.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def _same_machine(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and holder.get("machine") in (None, _machine())


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the owner is a living process of this machine."""
    if not holder or not _same_machine(holder):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and another user's
    started = _started(holder["pid"])
    return started is None or (started >= 0 and holder.get("started") in (None, started))


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "an owner whose lease cannot be read"
    return (
        f"host {holder['host']}, pid {holder['pid']} (lease renewed {max(0, time.time() - holder['time']):.0f} s ago)"
    )
