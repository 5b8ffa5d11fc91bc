"""The hosts of a supervised run: who is in, who has failed how often, and how many slots fit the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from vitds.cluster.hostfile import Host
from vitds.cluster.supervise.remote import Answer


class Pool:
    """The hosts of one hostfile.

    Args:
        hosts: all of them.
        drop_after: failures after which a host is left out for good.
    """

    def __init__(self, hosts: Sequence[Host], drop_after: int) -> None:
        self.hosts, self.in_use = list(hosts), list(hosts)
        self.failures: dict[str, int] = {}
        self.here: set[str] = set()
        """Names of this very host."""
        self.drop_after = drop_after
        self._known_as: dict[str, str] = {}

    @property
    def candidates(self) -> list[str]:
        """Names of the hosts that have not been dropped."""
        return [host.name for host in self.hosts if not self.is_dropped(host.name)]

    @property
    def left_out(self) -> list[str]:
        """Names of the hosts that are not in use."""
        used = {host.name for host in self.in_use}
        return [host.name for host in self.hosts if host.name not in used]

    def is_dropped(self, name: str) -> bool:
        """Whether a host is out for good."""
        return self.failures.get(name, 0) >= self.drop_after

    def learn(self, answers: Iterable[Answer]) -> None:
        """Remember what hosts call themselves: incidents name them so, and a dead one cannot be asked."""
        for answer in answers:
            if not answer.trouble:
                self._known_as[answer.host] = answer.name
                self.here |= {answer.host} if answer.here else set()

    def blamed(self, names: Iterable[object]) -> set[str]:
        """The hosts in use that an incident means, as the hostfile names them; none if it means all of them.

        A fault of every host at once is the network's or the program's.
        """
        used = [host.name for host in self.in_use]
        found = {match for name in names if (match := self._find(str(name), used))}
        return set() if found == set(used) else found

    def charge(self, names: Iterable[str]) -> list[str]:
        """One more failure for each of these hosts; those which are dropped by it."""
        dropped = []
        for name in names:
            before = self.is_dropped(name)
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.is_dropped(name) and not before:
                dropped.append(name)
        return dropped

    def _find(self, name: str, used: Sequence[str]) -> str | None:
        for key in (str, _short):
            for host in used:
                if key(name).lower() in (key(host).lower(), key(self._known_as.get(host, host)).lower()):
                    return host
        return None


def fitted(hosts: Sequence[Host], global_batch: int, micro_batch: int = 1) -> list[Host]:
    """The hosts with as many slots as can share the global batch evenly; the last ones give up theirs first.

    Args:
        hosts: those that are left.
        global_batch: train_batch_size.
        micro_batch: train_micro_batch_size_per_gpu if the run file fixes it, else 1.
    """
    total = sum(host.slots for host in hosts)
    world = next((n for n in range(total, 0, -1) if global_batch % (n * micro_batch) == 0), total)
    kept = []
    for host in hosts:
        if slots := min(host.slots, world):
            kept.append(replace(host, slots=slots))
        world -= slots
    return kept


def _short(name: str) -> str:
    """The first label of a name; an address stays whole."""
    return name if name.replace(".", "").isdigit() else name.partition(".")[0]
