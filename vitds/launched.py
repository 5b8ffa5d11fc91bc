"""What a launcher has told this process: its rank, the world and where they meet.

`deepspeed` and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. mpirun and srun have words of their
own, and a rank that does not know them takes itself for the only one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from vitds.errors import UserError

MASTER_PORT = "29500"
"""torch's own default."""
_WORDS = {
    "mpirun": {
        "RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE", "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    "srun": {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"},
}  # fmt: skip


def by_a_launcher(environ: Mapping[str, str]) -> bool:
    """Whether this process is a rank that a launcher has started."""
    return "RANK" in environ or _launcher(environ) is not None


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give what mpirun, srun or torchrun says the names that torch and DeepSpeed read.

    A process of one rank keeps what it has. Slurm's words count in a step alone: a batch script has them too, and is one
    process, whatever the job's size.

    Raises:
        UserError: ranks are several, and nothing says where they meet.
    """
    if "LOCAL_WORLD_SIZE" in environ:  # torchrun; DeepSpeed counts a CPU's processes by LOCAL_SIZE
        environ.setdefault("LOCAL_SIZE", environ["LOCAL_WORLD_SIZE"])
    if "RANK" in environ:
        return
    launcher = _launcher(environ)
    if launcher is None:
        return
    words = _WORDS[launcher]
    if "MASTER_ADDR" not in environ:
        how = {
            "mpirun": f"mpirun -x MASTER_ADDR=HOST -x MASTER_PORT={MASTER_PORT} …, or with DeepSpeed's launcher "
            f'--launcher_args "-x MASTER_ADDR=HOST -x MASTER_PORT={MASTER_PORT}"',
            "srun": 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) before srun',
        }[launcher]
        raise UserError(
            f"{launcher} has started {environ[words['WORLD_SIZE']]} ranks and MASTER_ADDR, the host of rank 0, is not set: {how}"
        )
    for name, word in words.items():
        if word in environ:
            environ[name] = environ[word]
    if launcher == "srun":
        environ.setdefault("LOCAL_SIZE", environ.get("SLURM_NTASKS_PER_NODE", "1"))
    environ.setdefault("MASTER_PORT", MASTER_PORT)


def _launcher(environ: Mapping[str, str]) -> str | None:
    """mpirun or srun, if one has started this process as one of several ranks."""
    for name, words in _WORDS.items():
        started = words["RANK"] in environ and environ.get(words["WORLD_SIZE"], "1") != "1"
        if started and (name != "srun" or "SLURM_STEP_ID" in environ):
            return name
    return None
