"""Hostfiles: the hosts of a job, one a line, each with the number of its processes: `node-01 slots=8`.

Read as DeepSpeed reads them, but strictly. DeepSpeed trains on one host where the file is missing, takes `slots=8x` for 8,
and puts host names into commands for a remote shell.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vitds.errors import UserError, nearest

MAX_SLOTS = 1024
"""Processes on one host: more than any has accelerators or cores for; DeepSpeed makes a list of that many numbers."""
MAX_HOSTS = 65536
"""Hosts of one job: about as many as Slurm would give it."""
_MAX_BYTES = MAX_HOSTS * 300
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LINE = re.compile(r"(\S+)[ \t]+slots=(\S*)(?:[ \t]+#.*)?")


@dataclass(frozen=True)
class Host:
    """One host of a job: its name as ssh knows it, and how many processes (accelerators) it takes."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a hostfile, in its order.

    Raises:
        UserError: no such file or not a plain one, not readable, not text, or `PATH:LINE: …` for the first line that is
            neither empty, a comment nor `name slots=N`, for a host named twice, and where there is no host at all.
    """
    path = Path(path)
    lines = (
        _text(path, "; DeepSpeed would train on this host alone").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    )
    hosts: list[Host] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not (found := _LINE.fullmatch(line)):
            raise UserError(f"{where}: {_shown(line)} is not of the form `name slots=N`; write: {_right_form(line)}")
        host = Host(found[1], _slots(found[2], where, found[1]))
        check_host_name(host.name, where)
        if (before := first_seen.setdefault(_same(host.name), number)) != number:
            raise UserError(
                f"{where}: host {host.name!r} is on line {before} already; a host has one line, with all its slots"
            )
        hosts.append(host)
    if not hosts:
        raise UserError(f"{path}: names no host; write one a line, as in: node-01 slots=8")
    if len(hosts) > MAX_HOSTS:
        raise UserError(f"{path}: {len(hosts)} hosts; at most {MAX_HOSTS} are allowed")
    return hosts


def check_host_name(name: str, where: str) -> None:
    """Refuse a name that is no host's, or that a shell, ssh or pdsh would take for something else.

    Raises:
        UserError: it is not a letter or digit followed by at most 252 letters, digits, dots, hyphens and underscores.
            Says `where`, and why.
    """
    if _NAME.fullmatch(name):
        return
    if not name:
        why = "it is empty"
    elif name.startswith("-"):
        why = "ssh would take it for an option"
    elif "@" in name:
        why = "write the host alone, and the user into ~/.ssh/config (Host …, User …)"
    elif "[" in name or "]" in name:
        why = "ranges are not expanded here; write each host on a line of its own"
    elif ":" in name:
        why = "no ports or IPv6 addresses; give them a name in ~/.ssh/config (Host …, HostName …, Port …)"
    elif len(name) > 253 and _NAME.fullmatch(name[:253]):
        why = f"it has {len(name)} characters, at most 253 are allowed"
    else:
        odd = next(
            (c for i, c in enumerate(name) if not re.fullmatch(r"[A-Za-z0-9]" if i == 0 else r"[\w.-]", c, re.A))
        )
        why = f"{odd!r} has no place there"
    raise UserError(
        f"{where}: {_shown(name)} is not a host name: {why}; "
        "allowed are letters, digits, dots, hyphens and underscores, a letter or digit first"
    )


def format_hostfile(hosts: Sequence[Host], comment: str = "") -> str:
    """The text of a hostfile. `comment` stands above, each of its lines after a `#`.

    Raises:
        UserError: no host, one twice, or a name or number of slots that `read_hostfile` would refuse.
    """
    if not hosts:
        raise UserError("hostfile: no host")
    seen: set[str] = set()
    for host in hosts:
        check_host_name(host.name, "hostfile")
        _slots(str(host.slots), "hostfile", host.name)
        if _same(host.name) in seen:
            raise UserError(f"hostfile: host {host.name!r} is there twice")
        seen.add(_same(host.name))
    lines = [f"# {line}" for line in comment.splitlines()] + [f"{host.name} slots={host.slots}" for host in hosts]
    return "\n".join(lines) + "\n"


def write_hostfile(path: str | Path, hosts: Sequence[Host], comment: str = "") -> None:
    """Write a hostfile, durably, so that `path` holds all of it or is what it was before.

    Raises:
        UserError: as `format_hostfile`; or it cannot be written there.
    """
    path, text = Path(path), format_hostfile(hosts, comment)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "is a directory")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def add_up(names: Iterable[tuple[str, int]]) -> dict[str, int]:
    """How often each host is named, weighted, in the order of their first mention."""
    total: dict[str, int] = {}
    for name, count in names:
        total[name] = total.get(name, 0) + count
    return total


def lines_of(path: str | Path, where: str) -> list[str]:
    """The lines of a file that a scheduler has named, without empty ones and comments.

    Raises:
        UserError: `where`, which names the file, and what is wrong with it.
    """
    try:
        lines = [line.strip() for line in _text(Path(path)).splitlines()]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _text(path: Path, if_missing: str = "") -> str:
    try:
        kind = path.stat()
        if stat.S_ISDIR(kind.st_mode):
            raise UserError(f"{path}: is a directory, not a hostfile")
        if not stat.S_ISREG(kind.st_mode):
            # DeepSpeed does not see what is no plain file, such as a pipe, and trains on one host.
            raise UserError(f"{path}: is not a plain file")
        if kind.st_size > _MAX_BYTES:
            raise UserError(f"{path}: has {kind.st_size} bytes; that is no hostfile")
        raw = path.read_bytes()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbour(path)}{if_missing}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if raw.startswith(b"\xef\xbb\xbf"):
        raise UserError(
            f"{path}:1: begins with a byte order mark, which DeepSpeed takes for a part of the first line; "
            "save it as UTF-8 without BOM"
        )
    bad = raw.find(b"\0")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        bad = error.start if bad < 0 else min(bad, error.start)
    if bad >= 0:
        raise UserError(f"{path}:{raw[:bad].count(10) + 1}: is not text (UTF-8), so this is no hostfile")
    return text


def _neighbour(path: Path) -> str:
    try:
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_file()]
    except OSError:
        return f": {path.parent} cannot be listed"
    return nearest(path.name, names)


def _slots(text: str, where: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(
            f"{where}: slots={_shown(text, quote='')} of {_shown(name)} is not a whole number, as in slots=8"
        )
    if not 1 <= int(text) <= MAX_SLOTS:
        remedy = "; to leave the host out, remove its line" if int(text) == 0 else ""
        raise UserError(f"{where}: slots={int(text)} of {_shown(name)}: 1 to {MAX_SLOTS} are allowed{remedy}")
    return int(text)


def _right_form(line: str) -> str:
    """What somebody who wrote `line` may have meant."""
    words = [word for word in re.split(r"[\s=:,;]+", line) if word]
    name = next((word for word in words if _NAME.fullmatch(word) and not re.fullmatch(r"slots?|\d+", word)), "node-01")
    number = next((word for word in words if re.fullmatch(r"[1-9][0-9]{0,2}", word) and word != name), "8")
    return f"{name} slots={number}"


def _same(name: str) -> str:
    """Equal for two spellings of one host: names of hosts know no case."""
    return name.lower().rstrip(".")


def _shown(text: str, quote: str = "'") -> str:
    """`text` with nothing in it that a terminal would act on, and not too much of it."""
    return quote + ascii(text if len(text) <= 80 else text[:77] + "...")[1:-1] + quote
