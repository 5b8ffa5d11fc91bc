"""Joining the other ranks."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import deepspeed
import torch

from vitds import dist
from vitds.cluster.preflight import early_checks, several_hosts
from vitds.errors import UserError

MEET_SECONDS = 120.0
"""How long a host that refuses a start waits for the others, to tell them."""


@contextmanager
def refusals_shared() -> Iterator[None]:
    """What the user got wrong on one host alone (a file that is missing there) ends the start on all of them.

    In a job of several hosts the error is raised in the others' `init_distributed` too; otherwise they would wait for
    this host as long as a group may take to form.
    """
    try:
        yield
    except UserError as error:
        if several_hosts():
            with suppress(RuntimeError):  # they cannot be met either; what counts is the error
                init_distributed(MEET_SECONDS / 60, error)
        raise


def init_distributed(timeout_minutes: float = 30, refusal: UserError | None = None) -> None:
    """Join the process group; under no launcher at all, a group of one.

    Args:
        timeout_minutes: how long a collective may take.
        refusal: what is wrong here, for all to know before anything is made.

    Raises:
        UserError: the refusal of any rank; see vitds.cluster.preflight.early_checks.
    """
    # DeepSpeed compiles a shared-memory op for inference when it starts on CPUs: 40 s, a lock that a killed process
    # leaves behind and every later start waits for, and 69 MB of /dev/shm a rank. Training never uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its warnings are about consent and deprecations; what a user must know is said by vitds.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    early_checks()
    if "RANK" not in os.environ:  # else DeepSpeed would look for MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({**alone, "MASTER_PORT": str(free.getsockname()[1])})
    if dist.device().type == "cuda":
        torch.cuda.set_device(dist.device())  # collectives of objects before the engine exists use the current device
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)

    def agree() -> None:
        if refusal is not None:
            raise refusal

    dist.together(agree)
