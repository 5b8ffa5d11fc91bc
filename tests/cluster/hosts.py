"""Two hosts on one machine: Linux namespaces with their own network, name, processes and shared memory, and an sshd each.

The hosts share the file system, as a cluster's do, and a switch. A host can be killed, frozen, cut off or slowed.
Everything listens inside namespaces that are made here and end with them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.launching import ROOT, environment

TOOLS = ("unshare", "nsenter", "ip", "tc", "ssh", "ssh-keygen", "sshd", "pdsh")
NAMES = ("alpha", "beta")
INTERFACE = "eth0"
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_serial = itertools.count()


def why_not() -> str | None:
    """Why there can be no such hosts here, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"needs {', '.join(missing)} (packages iproute2, openssh-server, pdsh)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount", "--mount-proc", "true"], capture_output=True, text=True)  # fmt: skip
    return f"namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One of the hosts."""

    def __init__(self, name: str, address: str, directory: Path) -> None:
        self.name, self.address = name, address
        self._directory = directory
        self._unshare: subprocess.Popen[bytes] | None = None
        self.init = 0
        """Its process 1, as seen from outside; 0 while it is down."""
        self._space = ""
        """Its processes' namespace."""

    def boot(self) -> None:
        """Start it; it has no link yet."""
        ready, go = self._directory / f"{self.name}.up", self._directory / f"{self.name}.go"
        for path in (ready, go):
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        ours = self._directory
        script = f"""set -e
            hostname {self.name}
            mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /run; mkdir /run/sshd
            mount --bind {ours}/hosts /etc/hosts; mount --bind {ours}/ssh_config /etc/ssh/ssh_config
            ip link set lo up; echo up > {ready}; read line < {go}
            exec {shutil.which("sshd", path=_PATH)} -D -f {ours}/sshd_config -E {ours}/{self.name}.sshd.log"""
        spaces = ["--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
        self._unshare = subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", script], env={**os.environ, "PATH": _PATH}, start_new_session=True
        )
        ready.read_text()
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text()
        self.init = int(children.split()[0])
        self._space = os.readlink(f"/proc/{self.init}/ns/pid")

    def serve(self) -> None:
        """Start its sshd; the link is there."""
        (self._directory / f"{self.name}.go").write_text("go\n")

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on this host, in the hosts' directory (nsenter itself would go to /)."""
        assert self.init, f"{self.name} is down"
        spaces = ["nsenter", "-t", str(self.init), "-n", "-u", "-i", "-p", "-m", "--"]
        return [*spaces, "env", "-C", str(self._directory), *words]

    def run(self, *words: str) -> str:
        """Run to the end, and return what it printed; it must succeed."""
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True, timeout=60).stdout

    def processes(self) -> dict[int, str]:
        """The living processes of this host but its sshd: {pid seen from outside: command line}."""
        found = {}
        for pid in self._pids():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if words[0] and "sshd" not in words[0]:
                    found[pid] = " ".join(words).strip()
        return found

    def kill(self) -> None:
        """Pull its plug: every process is gone at once, nothing is said to anybody."""
        assert self._unshare is not None
        self._unshare.kill()  # takes process 1 along, and that all others
        self._unshare.wait()
        while self._pids():
            pass
        self.init = 0

    def freeze(self) -> None:
        """Stop all of its processes; their connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        """All of its processes, as seen from outside."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc") if self._space else ()):
            with suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/pid") == self._space:
                    found.append(int(entry))
        return found


class Switch:
    """Joins the hosts: a bridge in a namespace of its own, so that a host that dies leaves the others their cards."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ports: dict[str, str] = {}

    def start(self) -> None:
        """Turn it on, with no cable in it."""
        self._process = subprocess.Popen(
            ["unshare", "--net", "--kill-child", "--fork", "sh", "-c", "echo up; exec sleep infinity"], text=True,
            stdout=subprocess.PIPE, env={**os.environ, "PATH": _PATH}, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._run("ip", "link", "add", "bridge", "type", "bridge")
        self._run("ip", "link", "set", "bridge", "up")

    def plug_in(self, host: Host) -> None:
        """A cable to a host, which gets its card and its address."""
        assert self._process is not None
        stem = f"v{os.getpid():x}{next(_serial):x}"
        port = self._ports[host.name] = f"{stem}s"
        words = ["ip", "link", "add", f"{stem}h", "type", "veth", "peer", "name", port, "netns", str(self._inside())]
        subprocess.run(words, check=True, env={**os.environ, "PATH": _PATH})
        subprocess.run(
            ["ip", "link", "set", f"{stem}h", "netns", str(host.init), "name", INTERFACE], check=True, env={**os.environ, "PATH": _PATH}
        )  # fmt: skip
        self._run("ip", "link", "set", port, "master", "bridge", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
        host.run("ip", "link", "set", INTERFACE, "up")

    def cut(self, host: Host) -> None:
        """From here on packets from and to a host vanish; it still has a carrier."""
        self._run("ip", "link", "set", self._ports[host.name], "nomaster")

    def throttle(self, host: Host) -> None:
        """A slow port with a short queue: what does not fit into it is lost."""
        self._run(
            "tc", "qdisc", "add", "dev", self._ports[host.name], "root", "tbf", "rate", "8mbit", "burst", "4kb", "limit", "16kb"
        )  # fmt: skip

    def mend(self, host: Host) -> None:
        """Undo `cut` and `throttle`."""
        self._run("ip", "link", "set", self._ports[host.name], "master", "bridge", "up")
        self._run("sh", "-c", f"tc qdisc del dev {self._ports[host.name]} root 2>&1 || true")

    def stop(self) -> None:
        """Turn it off."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _inside(self) -> int:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        return int(children.split()[0])

    def _run(self, *words: str) -> None:
        command = ["nsenter", "-t", str(self._inside()), "-n", "--", *words]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": _PATH})


class Hosts:
    """Two hosts and the switch between them; `directory` is theirs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.all = [Host(name, f"10.99.0.{i + 1}", directory) for i, name in enumerate(NAMES)]
        self.alpha, self.beta = self.all
        self.switch = Switch()

    def start(self) -> None:
        """Boot both, join them, and wait until both answer ssh."""
        self._write_files()
        self.switch.start()
        for host in self.all:
            host.boot()
            self.switch.plug_in(host)
            host.serve()
        for host in self.all:
            self._wait_for_ssh(host)

    def _wait_for_ssh(self, host: Host) -> None:
        deadline = time.monotonic() + 20
        while subprocess.run(self.alpha.command("ssh", host.name, "true"), capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.directory / f"{host.name}.sshd.log").read_text()

    def _write_files(self) -> None:
        ours = self.directory
        ours.mkdir(parents=True, exist_ok=True)
        for name in ("host_key", "key"):
            if not (ours / name).exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ours / name)], check=True)
        shutil.copy(ours / "key.pub", ours / "authorized_keys")
        (ours / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in self.all))
        (ours / "ssh_config").write_text(
            f"Host *\n  IdentityFile {ours}/key\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            "  LogLevel ERROR\n  ConnectTimeout 5\n"
        )
        (ours / "sshd_config").write_text(
            f"HostKey {ours}/host_key\nAuthorizedKeysFile {ours}/authorized_keys\nPermitRootLogin yes\nStrictModes no\n"
            "UsePAM no\nPidFile none\nMaxStartups 100\n"
        )

    def hostfile(self, **slots: int) -> Path:
        """A hostfile with these slots by name; its name is that of its content."""
        path = self.directory / f"hostfile-{'-'.join(f'{name}{n}' for name, n in slots.items())}"
        path.write_text("".join(f"{name} slots={n}\n" for name, n in slots.items()))
        return path

    def start_on(self, host: Host, *words: str, output: Path | None = None, **more: str) -> subprocess.Popen[str]:
        """Start `words` on a host, in `directory`; what is printed goes to the file `output` or to a pipe."""
        with open(output or os.devnull, "w") as file:
            return subprocess.Popen(
                host.command(*words), cwd=self.directory, env=self.environment(more), text=True,
                stdout=file if output else subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def deepspeed(
        self, hostfile: Path, script: Path | str, *arguments: str, flags: tuple[str, ...] = (), timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """The user's own command on alpha: `deepspeed --hostfile HOSTFILE SCRIPT …`, to its end."""
        words = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile), *flags, str(script)]
        process = self.start_on(self.alpha, *words, *arguments)
        try:
            printed, _ = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(words, process.returncode, printed)

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """That of a user who is logged in on a host; `.deepspeed_env` carries it to the other."""
        exported = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, **more}
        (self.directory / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in exported.items()))
        kept = environment(**exported)
        for name in ("SSH_AUTH_SOCK", "SSH_CONNECTION"):
            kept.pop(name, None)
        return {**kept, "PATH": os.pathsep.join([kept["PATH"], "/usr/sbin", "/sbin"]), "PYTHONPATH": str(ROOT)}

    def stop(self) -> None:
        """End both, and everything in them."""
        for host in self.all:
            if host.init:
                host.kill()
        self.switch.stop()


@contextmanager
def two_hosts(directory: Path) -> Iterator[Hosts]:
    """Two hosts that are up for as long as the block runs."""
    hosts = Hosts(directory)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()
