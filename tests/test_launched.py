"""What mpirun, srun and torchrun say is understood; a process of its own keeps what it has."""

from __future__ import annotations

import pytest

from tests.launching import deepspeed
from vitds.errors import UserError
from vitds.launched import adopt

MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "2",
}
KNOWN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "node-01",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("told", [MPI, STEP], ids=["mpirun", "srun"])
def test_words_of_other_launchers_are_adopted(told):
    environ = {**told, "MASTER_ADDR": "node-01"}
    adopt(environ)
    assert {name: environ[name] for name in KNOWN} == KNOWN
    given = {**told, **KNOWN, "RANK": "0", "MASTER_PORT": "1"}
    adopt(given)
    assert (given["RANK"], given["MASTER_PORT"]) == ("0", "1")


@pytest.mark.parametrize("told", [MPI, STEP], ids=["mpirun", "srun"])
def test_ranks_that_know_no_meeting_point_are_refused(told):
    environ = dict(told)
    with pytest.raises(UserError, match="has started 4 ranks and MASTER_ADDR.*not set: .*MASTER_ADDR="):
        adopt(environ)
    assert environ == told


@pytest.mark.parametrize(
    "told",
    [
        {},
        {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"},  # the batch script itself
        {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {**MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_process_of_its_own_stays_one(told):
    environ = dict(told)
    adopt(environ)
    assert environ == told


def test_torchrun_counts_its_processes_by_another_word():
    environ = {"RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    adopt(environ)
    assert environ["LOCAL_SIZE"] == "2"


@pytest.mark.launch
def test_a_mistyped_hostfile_does_not_train_on_one_host(tmp_path):
    (tmp_path / "hostfile").write_text("node-01 slots=8\n")
    arguments = ["--config", "ds_configs/digits.json", "--output-dir", str(tmp_path / "run")]
    done = deepspeed(1, "launcher/train.py", *arguments, flags=["--hostfile", str(tmp_path / "hostfil")])
    assert done.returncode == 2, done.stdout
    assert f"{tmp_path}/hostfil: no such file (did you mean 'hostfile'?)" in done.stdout
    assert not (tmp_path / "run").exists()
