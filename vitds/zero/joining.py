"""Joining the other ranks."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from datetime import timedelta

import deepspeed
import torch

from vitds import dist
from vitds.cluster.preflight import early_checks


def init_distributed(timeout_minutes: float = 30) -> None:
    """Join the process group; under no launcher at all, a group of one.

    Raises:
        UserError: see vitds.cluster.preflight.early_checks.
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
