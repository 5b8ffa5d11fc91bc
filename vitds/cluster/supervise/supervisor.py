"""`vitds run --max-restarts N -- deepspeed …`: starts a run again after a crash, without the hosts that fail."""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any

from vitds.cluster.hostfile import Host, read_hostfile, write_hostfile
from vitds.cluster.supervise import account
from vitds.cluster.supervise import attempt as one
from vitds.cluster.supervise.account import Account
from vitds.cluster.supervise.attempt import Job, Signals, say
from vitds.cluster.supervise.launcher import Launcher
from vitds.cluster.supervise.pool import Pool, fitted
from vitds.cluster.supervise.remote import Remote
from vitds.cluster.supervise.verdict import Attempt, Limits, Verdict, verdict
from vitds.errors import EXIT_PREEMPTED, UserError
from vitds.json_files import Expendable, append_row

DROP_AFTER = 2
"""Failures after which a host is left out for good."""
_BETWEEN = "stopped by a signal between two attempts"
_ONLY_WITH_RESTARTS = ("restart_window", "backoff", "drop_after", "min_hosts")


def add_verb(verbs: Any) -> None:
    """Add `run` to the parser's verbs."""
    runs = verbs.add_parser(
        "run",
        help="run a launcher's command, pass signals to its ranks, exit 75 when preempted; start it again after a crash",
    )
    runs.add_argument(
        "--max-restarts", type=_number(int, 0), default=0, metavar="N",
        help="start the command again after a crash or a lost host, at most N times in a row without a new checkpoint "
        "and N times within --restart-window (0, the default: never)",
    )  # fmt: skip
    seconds = _number(float, 0)
    runs.add_argument("--restart-window", type=seconds, metavar="SECONDS", help=f"see --max-restarts; 0: no such limit (default: {Limits.window:g})")  # fmt: skip
    runs.add_argument("--backoff", type=seconds, metavar="SECONDS", help=f"wait before the first restart, doubled for each next one without a new checkpoint, at most 300 (default: {Limits.backoff:g})")  # fmt: skip
    runs.add_argument("--drop-after", type=_number(int, 1), metavar="N", help=f"leave a host out for good after N failures (default: {DROP_AFTER})")  # fmt: skip
    runs.add_argument("--min-hosts", type=_number(int, 1), metavar="N", help="with fewer hosts than N give up; given, hosts that do not answer at the start are left out (default: 1, and all must answer at the start)")  # fmt: skip
    runs.add_argument("command", nargs=argparse.REMAINDER, help="[--] deepspeed … launcher/train.py …")


def run(options: argparse.Namespace) -> int:
    """Do what `add_verb` has parsed; the exit code of `vitds.cluster.supervise.attempt.run`, 2 where a restart would be refused.

    Raises:
        UserError: no command, or it cannot be started; its hostfile cannot be used or does not answer.
    """
    given = {name: value for name in _ONLY_WITH_RESTARTS if (value := getattr(options, name)) is not None}
    if not options.max_restarts:
        if given:
            raise UserError(f"run: --{next(iter(given)).replace('_', '-')} means something only with --max-restarts N")
        return one.run(options.command)
    limits = Limits(
        options.max_restarts, given.get("restart_window", Limits.window), given.get("backoff", Limits.backoff)
    )
    drop_after = given.get("drop_after", DROP_AFTER)
    return _Supervisor(one.checked(options.command), limits, drop_after, given.get("min_hosts")).run()


class _Supervisor:
    """One run, over all of its attempts."""

    def __init__(self, words: list[str], limits: Limits, drop_after: int, min_hosts: int | None) -> None:
        self._launcher = Launcher(words)
        if self._launcher.output_dir is None:
            raise UserError("run: --max-restarts goes by outcome.json: the command needs an --output-dir")
        hosts = read_hostfile(self._launcher.hostfile) if self._launcher.hostfile else []
        if hosts and (word := {"--include", "--exclude"} & self._launcher.options.keys()):
            raise UserError(
                f"run: --max-restarts and {word.pop()} do not go together: a host that has been dropped could not be named "
                "there; write the hosts and slots to use into the hostfile"
            )
        if len(hosts) > 1 and "--master_addr" in self._launcher.options:
            raise UserError(
                "run: --max-restarts and --master_addr do not go together: that host may be left out; without it DeepSpeed "
                "asks the first host of each attempt for its address"
            )
        if min_hosts and min_hosts > len(hosts):
            raise UserError(f"run: --min-hosts {min_hosts}: the command has {len(hosts)} host(s) in its hostfile")
        self._output_dir = self._launcher.output_dir
        self._limits, self._min_hosts, self._must_all_answer = limits, min_hosts or 1, min_hosts is None
        self._mark = uuid.uuid4().hex
        self._remote = Remote(self._mark, self._launcher.ssh_port)
        self._pool = Pool(hosts, drop_after)
        self._attempts: list[Attempt] = []
        self._number = 0
        self._newest = Account(self._output_dir).newest_checkpoint()
        self._blamed: set[str] = set()
        self._began = time.monotonic()
        self._log = Expendable(self._output_dir / "events.jsonl")

    def run(self) -> int:
        """Attempt after attempt to the end; the exit code."""
        with Signals() as signals:
            if trouble := self._gather():
                raise UserError(f"run: {trouble}")
            while True:
                if signals.received is None:
                    self._attempt(signals)
                last = self._attempts[-1] if self._attempts else None
                if last is None:
                    return EXIT_PREEMPTED
                decided = verdict(self._attempts, self._limits)
                if decided.what == "restart":
                    say(f"attempt {self._number}: {decided.reason}; restart in {decided.wait:.3g} s")
                    decided = self._restart(signals, decided)
                if decided.what != "restart":
                    return self._end(decided)

    def _attempt(self, signals: Signals) -> None:
        """Start the command, wait for its end, and note what came of it."""
        self._number += 1
        before = Account(self._output_dir)
        hosts = [host.name for host in self._pool.in_use]
        job = Job(Launcher(self._words()), self._mark, self._remote, hosts, overseen=True)
        code = signals.follow(job)
        outcome, newest = job.outcome(), before.newest_checkpoint()
        incident = outcome.get("incident")
        step = next((s for s in (_whole(incident, "step"), _whole(outcome, "step")) if s is not None), newest)
        self._blamed = self._pool.blamed(incident.get("hosts") or []) if isinstance(incident, dict) else set()
        self._attempts.append(
            Attempt(
                code=code,
                reason=before.reason(code, outcome),
                state=outcome.get("state"),
                said_code=outcome.get("exit_code"),
                signalled=signals.received is not None,
                preempted_by=before.preempted_by() if outcome.get("state") == "preempted" else "",
                advanced=newest > self._newest,
                step=step,
                hosts=tuple(hosts),
                ended=time.monotonic(),
            )
        )
        self._newest = max(self._newest, newest)

    def _restart(self, signals: Signals, decided: Verdict) -> Verdict:
        """Wait, clear away what is left, and see who is there; what then becomes of the run."""
        while True:
            deadline = time.monotonic() + decided.wait
            # Not one sleep: a signal that comes just before it would be seen only after it.
            while signals.received is None and time.monotonic() < deadline:
                time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
            trouble = None if signals.received else self._gather()
            if signals.received:
                return Verdict("done", _BETWEEN)
            if not trouble:
                break
            if len(self._pool.candidates) < self._min_hosts:
                return Verdict("give up", trouble)
            # It may be the network, or they are starting up: ask again, as often as a run is started again.
            self._attempts.append(Attempt(1, trouble, started=False, step=self._newest, ended=time.monotonic()))
            decided = verdict(self._attempts, self._limits)
            if decided.what != "restart":
                return decided
            say(f"{trouble}; asking again in {decided.wait:.3g} s")
        if trouble := self._too_small():
            return Verdict("give up", trouble)
        last = self._attempts[-1]
        self._event(
            "restart", attempt=self._number + 1, reason=decided.reason, step=last.step, exit_code=last.code,
            hosts=[host.name for host in self._pool.in_use], left_out=self._pool.left_out,
            seconds=round(time.monotonic() - last.ended, 3),
        )  # fmt: skip
        most = self._limits.max_restarts
        say(f"attempt {self._number + 1}, restart {decided.in_a_row} of {most} without a new checkpoint")
        return decided

    def _gather(self) -> str | None:
        """End what is left of the run on other hosts, and choose those of the next attempt; why there are too few, or None.

        On this host the end of a job has seen to it.
        """
        if not self._pool.hosts:
            return None
        answers = self._remote.end(self._pool.candidates, self._patience())
        self._pool.learn(answers)
        silent = {answer.host: answer.trouble for answer in answers if answer.trouble}
        for answer in answers:
            if answer.done:
                say(f"{answer.host}: ended {answer.done} process(es) left there, {answer.killed} of them killed")
        if not self._number and silent and self._must_all_answer:
            said = "; ".join(f"{host} does not answer: {why}" for host, why in silent.items())
            return f"{said}; take it out of the hostfile, or say --min-hosts N to start with fewer"
        there = len(answers) - len(silent)
        at_fault = dict.fromkeys([*sorted(self._blamed), *(silent if there >= self._min_hosts else [])])
        self._blamed = set()
        dropped = self._pool.charge(at_fault)
        for host in at_fault:
            why = silent.get(host) or self._attempts[-1].reason
            self._tell_of(host, why, host in dropped, host in silent)
        left = [host for host in self._pool.hosts if host.name in self._pool.candidates and host.name not in silent]
        if len(left) < self._min_hosts:
            total = len(self._pool.hosts)
            return f"{len(left)} of {total} host(s) left, --min-hosts is {self._min_hosts}{_why(silent)}"
        self._pool.in_use = left if left == self._pool.hosts else self._fitted(left)
        return None

    def _patience(self) -> float:
        """Seconds for ranks that are left: where the run has not failed they may be saving."""
        failed = bool(self._attempts) and self._attempts[-1].state == "failed"
        return one.END_SECONDS if failed or not self._attempts else one.PATIENCE_SECONDS

    def _fitted(self, hosts: list[Host]) -> list[Host]:
        if {"--num_nodes", "--num_gpus", "--num_accelerators"} & self._launcher.options.keys():
            return hosts
        batch = Account(self._output_dir).run_file().get("train_batch_size")
        micro = Account(self._output_dir).run_file().get("train_micro_batch_size_per_gpu")
        if type(batch) is not int or type(micro) is not int or batch < 1 or micro < 1:
            return hosts
        configs, overrides = self._launcher.script_option("--config"), self._launcher.script_option("--set")
        fixed = account.fixes_micro_batch(configs[-1] if configs else None, overrides)
        found = fitted(hosts, batch, micro if fixed else 1)
        if (slots := sum(host.slots for host in hosts)) != (used := sum(host.slots for host in found)):
            say(
                f"{used} of the {slots} slots that are left are used: a global batch of {batch} does not divide by more"
            )
        return found

    def _too_small(self) -> str | None:
        """Why the hosts that are left are too few for the run file, or None."""
        if not self._pool.hosts:
            return None
        section = Account(self._output_dir).run_file().get("vitds")
        cluster = section.get("cluster") if isinstance(section, dict) else None
        least = cluster.get("min_gpus") if isinstance(cluster, dict) else None
        slots = sum(host.slots for host in self._pool.in_use)
        if type(least) is int and slots < least and self._pool.in_use != self._pool.hosts:
            return f"{slots} slot(s) left, vitds.cluster.min_gpus is {least}"
        return None

    def _words(self) -> list[str]:
        """The command, with a hostfile of its own where some hosts or slots are left out."""
        hosts = self._pool.in_use
        if hosts == self._pool.hosts:
            return self._launcher.words
        path = self._output_dir / f"hostfile.attempt-{self._number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_hostfile(path, hosts, f"Attempt {self._number} of a supervised run; from {self._launcher.hostfile}.")
        # With one host in its hostfile, deepspeed starts the ranks where it runs itself, whatever the name.
        elsewhere = len(hosts) == 1 and hosts[0].name not in self._pool.here
        return self._launcher.with_hostfile(path, *(["--force_multi"] if elsewhere else []))

    def _tell_of(self, host: str, why: str, dropped: bool, silent: bool) -> None:
        times = self._pool.failures[host]
        then = "dropped" if dropped else f"left out of attempt {self._number + 1}" if silent else "it stays in"
        say(f"{host}: failure {times} of {self._pool.drop_after}: {why}; {then}")
        if dropped:
            self._event(
                "drop host", attempt=self._number + 1, hosts=[host], reason=why, failures=times, step=self._newest
            )

    def _end(self, decided: Verdict) -> int:
        """Leave nothing behind, say what was, and return the exit code."""
        last = self._attempts[-1]
        if last.state not in ("finished", "preempted"):
            for answer in self._remote.end(self._pool.candidates if self._pool.hosts else [], self._patience()):
                if answer.done:
                    say(f"{answer.host}: ended {answer.done} process(es) left there, {answer.killed} of them killed")
        seconds = time.monotonic() - self._began
        if decided.what == "give up":
            say(f"giving up: {decided.reason}")
            self._event(
                "give up", attempt=self._number, reason=decided.reason, step=last.step, exit_code=last.code,
                hosts=[host for host, times in self._pool.failures.items() if times], seconds=round(seconds, 3),
            )  # fmt: skip
        out = ", ".join(f"{host} ({times})" for host, times in self._pool.failures.items())
        failed = f"; failures by host: {out}" if out else ""
        say(
            f"{decided.reason if decided.what == 'done' else 'gave up'} after {self._number} attempt(s) in {seconds:.0f} s{failed}"
        )
        if decided.reason == _BETWEEN:
            return EXIT_PREEMPTED  # the same command goes on from the newest checkpoint
        if last.refused:
            return 2
        return last.code if last.state == "finished" or last.signalled else last.code or 1

    def _event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl, where there is a run to have events; nobody owns the directory between two attempts."""
        if self._output_dir.is_dir():
            with self._log:
                append_row(self._output_dir / "events.jsonl", {"time": time.time(), "kind": kind, **fields})


def _why(silent: dict[str, str]) -> str:
    return "".join(f"; {host} does not answer: {why}" for host, why in silent.items())


def _whole(said: Any, key: str) -> int | None:
    value = said.get(key) if isinstance(said, dict) else None
    return value if type(value) is int else None


def _number(kind: type, least: int) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value < 1e9:
            raise argparse.ArgumentTypeError(f"expected a number ≥ {least}, found {text}")
        return value

    read.__name__ = "whole number" if kind is int else "number"  # argparse names it where the text is no number
    return read
