"""`vitds hostfile`: the hosts that a scheduler has given this job, as a hostfile.

Slurm, PBS (OpenPBS, PBS Pro, Torque), LSF, Grid Engine and Kubernetes MPIJobs say it in variables and files of their own.
How many processes a host takes is its number of GPUs where the scheduler tells it, otherwise its number of tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitds.cluster.hostfile import (
    MAX_SLOTS,
    Host,
    add_up,
    check_host_name,
    format_hostfile,
    lines_of,
    read_hostfile,
    write_hostfile,
)
from vitds.cluster.slurm import TASKS, expand_nodelist, number_of_gpus, slurm_slots
from vitds.errors import UserError, one_of

Environ = Mapping[str, str]
MPI_HOSTFILE = "/etc/mpi/hostfile"
"""Where Kubeflow's MPI operator puts it, in launcher and workers."""


@dataclass(frozen=True)
class _Found:
    """What one scheduler says."""

    counts: dict[str, int]
    """Slots by host, in the scheduler's order."""
    hosts_by: str
    """The variable or file that names the hosts, and whom it names besides."""
    slots_by: str
    """Where the numbers come from; empty: nowhere, so that --slots is needed."""


def hosts_from(environ: Environ, scheduler: str | None = None, slots: int | None = None) -> tuple[str, list[Host]]:
    """The hosts of the job whose environment this is, and one line that says from where they and their slots are.

    Args:
        environ: the job's environment variables.
        scheduler: a key of `SCHEDULERS`. None: the one whose variables are there.
        slots: processes of every host. None: as the scheduler has it.

    Raises:
        UserError: no or several schedulers; a variable or file of its that is missing or malformed; a name that is no
            host's; a number of slots it does not tell. Names the variable, its value and what to do.
    """
    name = scheduler or _detected(environ)
    if name not in SCHEDULERS:
        raise UserError(one_of("--from", name, SCHEDULERS))
    variables, read = SCHEDULERS[name]
    if not any(environ.get(variable) for variable in variables) and name != "mpijob":
        raise UserError(f"hostfile: no job of {name}: {' and '.join(variables)} are not set")
    found = read(environ)
    if slots is not None:
        _check_slots(slots, "--slots")
        found = replace(found, counts=dict.fromkeys(found.counts, slots), slots_by=f"--slots {slots}")
    if not found.slots_by:
        raise UserError(f"hostfile: {name} does not say how many processes a host takes; give --slots")
    for host, count in found.counts.items():
        check_host_name(host, found.hosts_by)
        _check_slots(count, f"{found.slots_by}: host {host}")
    hosts = [Host(host, count) for host, count in found.counts.items()]
    total = sum(host.slots for host in hosts)
    return f"{name}: {len(hosts)} host(s) by {found.hosts_by}, {total} slot(s) by {found.slots_by}", hosts


def add_verb(verbs: Any) -> None:
    """Add `hostfile` to the parser's verbs."""
    parser = verbs.add_parser(
        "hostfile", help="write the hostfile of this job from what its scheduler says, or check one"
    )
    parser.add_argument("--from", dest="scheduler", metavar="SCHEDULER", help=f"one of {', '.join(SCHEDULERS)}")
    parser.add_argument("--slots", type=int, metavar="N", help="processes (accelerators) of each host")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it there instead of printing it")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="read this hostfile as the launcher would; write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> int:
    """Do what `add_verb` has parsed; 0.

    Raises:
        UserError: as `hosts_from`, `read_hostfile` and `write_hostfile`; options that exclude each other.
    """
    if options.check is not None:
        if options.output is not None or options.slots is not None or options.scheduler is not None:
            raise UserError("hostfile: --check reads a hostfile; it goes with --json only")
        hosts = read_hostfile(options.check)
        said = f"{options.check}: {len(hosts)} host(s), {sum(host.slots for host in hosts)} slot(s)"
    else:
        said, hosts = hosts_from(os.environ, options.scheduler, options.slots)
    text = format_hostfile(hosts, f"by vitds hostfile; {said}")
    if options.output is not None:
        write_hostfile(options.output, hosts, f"by vitds hostfile; {said}")
    if options.json:
        rows = [{"name": host.name, "slots": host.slots} for host in hosts]
        print(json.dumps({"hosts": rows, "slots": sum(host.slots for host in hosts), "from": said}, indent=2))
    elif options.check is not None:
        print(said)
    elif options.output is None:
        print(text, end="")
    if options.check is None:
        print(f"vitds hostfile: {said}", file=sys.stderr)
    return 0


def _detected(environ: Environ) -> str:
    def shown(variables: Iterable[str]) -> bool:
        return any(environ.get(variable) for variable in variables)

    names = [name for name, (variables, _) in SCHEDULERS.items() if name != "mpijob" and shown(variables)]
    # MPI's own variables may also be the user's, inside any other job; the first is the operator's.
    if shown(SCHEDULERS["mpijob"][0][:1] if names else SCHEDULERS["mpijob"][0]):
        names.append("mpijob")
    if len(names) > 1:
        raise UserError(f"hostfile: this may be a job of {' or of '.join(names)}; say which: --from {names[0]}")
    if not names:
        looked = "; ".join(f"{name}: {', '.join(variables)}" for name, (variables, _) in SCHEDULERS.items())
        raise UserError(f"hostfile: no job of any scheduler here; looked for ({looked}); by hand: see hostfile.example")
    return names[0]


def _slurm(environ: Environ) -> _Found:
    if (size := environ.get("SLURM_HET_SIZE", "1")) not in ("", "0", "1"):
        raise UserError(
            f"hostfile: a heterogeneous job of {size} components (SLURM_HET_SIZE): SLURM_JOB_NODELIST names the first "
            "component's hosts alone; write the hostfile by hand"
        )
    variable = "SLURM_JOB_NODELIST" if environ.get("SLURM_JOB_NODELIST") else "SLURM_NODELIST"
    names = expand_nodelist(environ.get(variable, ""), variable)
    counts, by = slurm_slots(environ, len(names))
    if by and len(counts) != len(names):
        raise UserError(f"{by}: numbers for {len(counts)} host(s), but {variable} has {len(names)}; give --slots")
    total = number_of_gpus(environ["SLURM_GPUS"], "SLURM_GPUS") if environ.get("SLURM_GPUS") else 0
    if total and by and sum(counts) != total:
        raise UserError(
            f"SLURM_GPUS={environ['SLURM_GPUS']}: {total} GPUs on {len(names)} hosts, which is not what {by} says; "
            "ask Slurm for --gpus-per-node, or give --slots"
        )
    return _Found(dict(zip(names, counts or [0] * len(names), strict=True)), variable, by)


def _pbs(environ: Environ) -> _Found:
    path = environ["PBS_NODEFILE"]
    counts = add_up((line, 1) for line in lines_of(path, "PBS_NODEFILE"))
    by = f"PBS_NODEFILE={path}"
    if gpu_file := environ.get("PBS_GPUFILE"):
        gpus = add_up(_torque_gpus(lines_of(gpu_file, "PBS_GPUFILE"), counts))
        if gpus:
            if without := [name for name in counts if name not in gpus]:
                raise UserError(f"PBS_GPUFILE={gpu_file}: no GPU of {without[0]}, which {by} has; give --slots")
            return _Found({name: gpus[name] for name in counts}, by, f"PBS_GPUFILE={gpu_file} (GPUs)")
    total = environ.get("PBS_NGPUS", "0")
    if (number := number_of_gpus(total, "PBS_NGPUS")) > 0:
        if len(counts) > 1:
            # NCI exports the job's number, other sites a hook's: the last host's.
            raise UserError(
                f"PBS_NGPUS={total}: the job's GPUs at some sites, one host's at others, and there are {len(counts)} hosts; "
                "give --slots with a host's"
            )
        return _Found(dict.fromkeys(counts, number), by, f"PBS_NGPUS={total} (GPUs)")
    return _Found(counts, by, f"the lines of PBS_NODEFILE ({TASKS})")


def _torque_gpus(lines: Iterable[str], names: Iterable[str]) -> Iterable[tuple[str, int]]:
    """One a line, as in `node01-gpu0`; the host may lack the domain it has in PBS_NODEFILE."""
    full = {name.partition(".")[0]: name for name in names} | {name: name for name in names}
    for line in lines:
        found = re.fullmatch(r"(\S+)-gpu[0-9]+", line)
        if not found or (name := full.get(found[1]) or full.get(found[1].partition(".")[0])) is None:
            raise UserError(f"PBS_GPUFILE: {line[:80]!r} is not `HOST-gpuN` of a host of PBS_NODEFILE; give --slots")
        yield name, 1


def _lsf(environ: Environ) -> _Found:
    if path := environ.get("LSB_DJOB_HOSTFILE"):
        counts, by = add_up((line, 1) for line in lines_of(path, "LSB_DJOB_HOSTFILE")), f"LSB_DJOB_HOSTFILE={path}"
    elif words := environ.get("LSB_MCPU_HOSTS", "").split():
        if len(words) % 2 or not all(re.fullmatch("[0-9]{1,6}", number) for number in words[1::2]):
            raise UserError(f"LSB_MCPU_HOSTS={' '.join(words)[:200]!r}: expected pairs such as: hostA 8 hostB 8")
        counts, by = add_up(zip(words[::2], map(int, words[1::2]), strict=True)), "LSB_MCPU_HOSTS"
    else:
        counts, by = add_up((word, 1) for word in environ.get("LSB_HOSTS", "").split()), "LSB_HOSTS"
    first, *others = counts
    if others and counts[first] == 1 < counts[others[0]] and len({counts[name] for name in others}) == 1:
        # Where jobs start on a host beside the ones they compute on, it comes first, with one slot.
        del counts[first]
        by += f" without {first}, whose one slot beside {counts[others[0]]} a host makes it the launch host"
    request = environ.get("LSB_EFFECTIVE_RSRCREQ", "")
    gpus = set(re.findall(r"\bngpus_physical=([0-9]{1,4})(?:\.0+)?(?=[,:\]/ ]|$)(?!/task)", request))
    if len(gpus) == 1 and (number := int(gpus.pop())):
        return _Found(dict.fromkeys(counts, number), by, f"ngpus_physical={number} of LSB_EFFECTIVE_RSRCREQ (GPUs)")
    return _Found(counts, by, f"{by.split(' ')[0]} ({TASKS})")


def _sge(environ: Environ) -> _Found:
    path = environ["PE_HOSTFILE"]
    rows = [line.split() for line in lines_of(path, "PE_HOSTFILE")]
    if bad := [row for row in rows if len(row) < 2 or not re.fullmatch("[0-9]{1,6}", row[1])]:
        raise UserError(
            f"PE_HOSTFILE={path}: {' '.join(bad[0])[:80]!r} is not of the form: host slots queue processors"
        )
    counts = add_up((row[0], int(row[1])) for row in rows)  # a host has a line for each queue that serves it
    for name in sorted(environ):
        ids = re.findall(r"[^\s,]+", environ[name]) if re.fullmatch(r"SGE_HGR_\w*gpu\w*", name, re.I) else []
        if ids:
            taken = " of this host, taken for all" if len(counts) > 1 else ""
            return _Found(
                dict.fromkeys(counts, len(ids)), f"PE_HOSTFILE={path}", f"{name}={environ[name]} (GPUs{taken})"
            )
    return _Found(counts, f"PE_HOSTFILE={path}", f"PE_HOSTFILE ({TASKS})")


def _mpijob(environ: Environ) -> _Found:
    named = [name for name in SCHEDULERS["mpijob"][0][1:] if environ.get(name)]
    path = environ[named[0]] if named else MPI_HOSTFILE
    default = environ.get("OMPI_MCA_orte_set_default_slots", "")
    pairs: list[tuple[str, int]] = []
    for line in lines_of(path, named[0] if named else "mpijob"):
        found = re.fullmatch(r"([^\s:]+)(?:\s+slots=|:)([0-9]{1,6})(?:\s.*)?", line)
        if not found and not (re.fullmatch(r"[^\s:]+", line) and default.isascii() and default.isdigit()):
            raise UserError(f"{path}: {line[:80]!r} is neither `HOST slots=N` nor `HOST:N`")
        pairs.append((found[1], int(found[2])) if found else (line, int(default[:9])))
    return _Found(add_up(pairs), path, f"slotsPerWorker in {path}")


def _check_slots(count: int, where: str) -> None:
    if not 1 <= count <= MAX_SLOTS:
        raise UserError(
            f"{where}: {count} slots; 1 to {MAX_SLOTS} are allowed; give --slots with a host's number of GPUs"
        )


SCHEDULERS: dict[str, tuple[tuple[str, ...], Callable[[Environ], _Found]]] = {
    "slurm": (("SLURM_JOB_NODELIST", "SLURM_NODELIST"), _slurm),
    "pbs": (("PBS_NODEFILE",), _pbs),
    "lsf": (("LSB_DJOB_HOSTFILE", "LSB_MCPU_HOSTS", "LSB_HOSTS"), _lsf),
    "sge": (("PE_HOSTFILE",), _sge),
    "mpijob": (
        ("K_MPI_JOB_ROLE", "OMPI_MCA_orte_default_hostfile", "I_MPI_HYDRA_HOST_FILE", "HYDRA_HOST_FILE"),
        _mpijob,
    ),
}
"""By name: the variables by which a job of it is known, the first the surest, and what reads the rest."""
