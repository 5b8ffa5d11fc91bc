"""`vitds hostfile`: golden strings as real schedulers write them, and what is wrong with others."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest

from vitds.cluster import schedulers
from vitds.cluster.hostfile import Host, read_hostfile
from vitds.cluster.schedulers import hosts_from
from vitds.cluster.slurm import expand_counts, expand_nodelist, number_of_gpus
from vitds.errors import UserError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gnode[10,20,25,37]", ["gnode10", "gnode20", "gnode25", "gnode37"]),
        ("gpu[001-004,007]", ["gpu001", "gpu002", "gpu003", "gpu004", "gpu007"]),
        ("node01", ["node01"]),
        ("login1,gpu[08-11]", ["login1", "gpu08", "gpu09", "gpu10", "gpu11"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("cn[1-2,5].cluster.local,dgx-[09-10]", ["cn1.cluster.local", "cn2.cluster.local", "cn5.cluster.local", "dgx-09", "dgx-10"]),
        ("rack[1-2]node[01-02,16]", [f"rack{r}node{n}" for r in (1, 2) for n in ("01", "02", "16")]),
        ("nid[000999-001001]", ["nid000999", "nid001000", "nid001001"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("x[0]y[3-4]z", ["x0y3z", "x0y4z"]),
    ],
)  # fmt: skip
def test_node_lists(text: str, names: list[str]):
    assert expand_nodelist(text, "SLURM_JOB_NODELIST") == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no node list"),
        ("(null)", "no node list"),
        ("gpu[1-4", "brackets do not match"),
        ("gpu1-4]", "brackets do not match"),
        ("gpu[1-[2-3]]", "brackets do not match"),
        ("gpu[4-1]", "the range '4-1' in 'gpu[4-1]' runs backwards"),
        ("gpu[1-010]", "padded differently"),
        ("gpu[]", "'' in 'gpu[]' is not a range"),
        ("gpu[1,]", "is not a range"),
        ("gpu[a-b]", "is not a range"),
        ("bgl[000x733]", "'000x733' in 'bgl[000x733]' is not a range"),
        ("a,,b", "an empty name between commas"),
        ("a,b,a", "'a' is there twice"),
        ("a[1-2,2]", "'a2' is there twice"),
        ("-oProxyCommand=x", "ssh would take it for an option"),
        ("a;reboot", "SLURM_JOB_NODELIST: 'a;reboot' is not a host name"),
        ("[1-2]", None),
    ],
)
def test_bad_node_lists(text: str, said: str | None):
    if said is None:
        assert expand_nodelist(text, "SLURM_JOB_NODELIST") == ["1", "2"]
        return
    with pytest.raises(UserError) as error:
        expand_nodelist(text, "SLURM_JOB_NODELIST")
    assert "SLURM_JOB_NODELIST" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("text", ["n[1-1000000000]", "n[1-999][1-999]", "n" + "[0-9]" * 20, "a[1-60000],b[1-60000]"])
def test_a_list_without_end_is_refused_before_it_is_made(text: str):
    start = time.monotonic()
    with pytest.raises(UserError, match="stands for more than 65536 hosts"):
        expand_nodelist(text, "X")
    assert time.monotonic() - start < 1


def test_numbers():
    assert expand_counts("2(x3),1", "X") == [2, 2, 2, 1]
    assert [number_of_gpus(text, "X") for text in ("8", "h100:8", "gres/gpu:a100_80gb:4", "a100:2,v100:1")] == [
        8,
        8,
        4,
        3,
    ]
    for text in ("", "2(x3", "2x3", "1,,2", "x", "-1", "1(x99999999)"):
        with pytest.raises(UserError, match="X="):
            expand_counts(text, "X")
    with pytest.raises(UserError, match="more than 65536"):
        expand_counts("1(x70000)", "X")
    for text in ("h100", "8,8", "h100:", "8;9"):
        with pytest.raises(UserError, match="X="):
            number_of_gpus(text, "X")


TWO = {"SLURM_JOB_NODELIST": "gpu[1-2]"}


@pytest.mark.parametrize(
    ("environ", "slots", "said"),
    [
        ({"SLURM_GPUS_PER_NODE": "h100:8", "SLURM_GPUS_ON_NODE": "4"}, [8, 8], "SLURM_GPUS_PER_NODE=h100:8 (GPUs)"),
        ({"SLURM_GPUS_PER_NODE": "a100:4(x2)"}, [4, 4], "a100:4(x2)"),
        ({"SLURM_GPUS_PER_NODE": "a100:4,a100:2(x1)"}, [4, 2], "(GPUs)"),
        ({"SLURM_GPUS_PER_NODE": "a100:2,v100:1"}, [3, 3], "(GPUs)"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1(x2)"}, [8, 8], "of this host, taken for all"),
        ({"SLURM_JOB_GPUS": "0,1,2,3"}, [4, 4], "SLURM_JOB_GPUS=0,1,2,3"),
        ({"SLURM_JOB_GPUS": "0-7", "SLURM_GPUS_ON_NODE": "0"}, [8, 8], "SLURM_JOB_GPUS"),
        ({"SLURM_GPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_GPUS_ON_NODE": "4"}, [4, 2], "×"),
        ({"SLURM_GPUS": "16", "SLURM_GPUS_ON_NODE": "8"}, [8, 8], "SLURM_GPUS_ON_NODE"),
        ({"SLURM_TASKS_PER_NODE": "2,1", "SLURM_NTASKS_PER_NODE": "3"}, [2, 1], "tasks, not GPUs; if that is wrong, give --slots"),
        ({"SLURM_NTASKS_PER_NODE": "4"}, [4, 4], "SLURM_NTASKS_PER_NODE=4 (tasks"),
        ({"SLURM_JOB_GPUS": "0", "SLURM_HET_SIZE": "1"}, [1, 1], "SLURM_JOB_GPUS"),
    ],
)  # fmt: skip
def test_slurm_slots(environ: dict[str, str], slots: list[int], said: str):
    origin, hosts = hosts_from({**TWO, **environ})
    assert hosts == [Host("gpu1", slots[0]), Host("gpu2", slots[1])]
    assert origin.startswith(f"slurm: 2 host(s) by SLURM_JOB_NODELIST, {sum(slots)} slot(s) by ")
    assert said in origin


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "slurm does not say how many processes a host takes; give --slots"),
        ({"SLURM_GPUS": "12", "SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS=12: 12 GPUs on 2 hosts"),
        ({"SLURM_TASKS_PER_NODE": "2(x3)"}, "numbers for 3 host(s), but SLURM_JOB_NODELIST has 2"),
        ({"SLURM_TASKS_PER_NODE": "0(x2)"}, "host gpu1: 0 slots"),
        ({"SLURM_GPUS_PER_NODE": "h100"}, "SLURM_GPUS_PER_NODE='h100': not a number of GPUs"),
        ({"SLURM_GPUS_PER_NODE": "5000"}, "5000 slots; 1 to 1024"),
        ({"SLURM_JOB_GPUS": "0,x"}, "SLURM_JOB_GPUS"),
        ({"SLURM_HET_SIZE": "2", "SLURM_GPUS_ON_NODE": "8"}, "heterogeneous job of 2 components"),
    ],
)
def test_bad_slurm(environ: dict[str, str], said: str):
    with pytest.raises(UserError) as error:
        hosts_from({**TWO, **environ})
    assert said in str(error.value)


def test_slots_by_hand():
    origin, hosts = hosts_from(TWO, slots=4)
    assert [host.slots for host in hosts] == [4, 4] and origin.endswith("--slots 4")
    for wrong in (0, -1, 1025):
        with pytest.raises(UserError, match="--slots"):
            hosts_from(TWO, slots=wrong)


def test_pbs(tmp_path: Path):
    nodes, gpus = tmp_path / "123.pbs", tmp_path / "123.pbsgpu"
    # OpenPBS, select=2:ncpus=64:mpiprocs=4 at a site with fully qualified names
    polaris = [f"x3002c0s{i}b0n0.hsn.cm.polaris.alcf.anl.gov" for i in (13, 19)]
    nodes.write_text("".join(f"{name}\n" * 4 for name in polaris))
    environ = {"PBS_NODEFILE": str(nodes)}
    origin, hosts = hosts_from(environ)
    assert hosts == [Host(name, 4) for name in polaris]
    assert origin.startswith("pbs: 2 host(s)") and "tasks, not GPUs" in origin
    # Torque, nodes=2:ppn=2:gpus=3, round robin
    nodes.write_text("node01.cluster\nnode02.cluster\nnode01.cluster\nnode02.cluster\n")
    gpus.write_text("".join(f"node0{host}-gpu{i}\n" for host in (2, 1) for i in (2, 1, 0)))
    origin, hosts = hosts_from({**environ, "PBS_GPUFILE": str(gpus)})
    assert hosts == [Host("node01.cluster", 3), Host("node02.cluster", 3)] and "PBS_GPUFILE" in origin
    gpus.write_text("node01-gpu0\n")
    with pytest.raises(UserError, match="no GPU of node02.cluster"):
        hosts_from({**environ, "PBS_GPUFILE": str(gpus)})
    gpus.write_text("node03-gpu0\n")
    with pytest.raises(UserError, match="'node03-gpu0' is not `HOST-gpuN`"):
        hosts_from({**environ, "PBS_GPUFILE": str(gpus)})
    gpus.write_text("")
    assert hosts_from({**environ, "PBS_GPUFILE": str(gpus)})[1][0].slots == 2
    with pytest.raises(UserError, match="PBS_NGPUS=8: the job's GPUs at some sites"):
        hosts_from({**environ, "PBS_NGPUS": "8"})
    nodes.write_text("gadi-gpu-v100-0001.gadi.nci.org.au\n" * 12)
    assert hosts_from({**environ, "PBS_NGPUS": "4"})[1] == [Host("gadi-gpu-v100-0001.gadi.nci.org.au", 4)]
    with pytest.raises(UserError, match="PBS_NODEFILE: .*124.pbs: no such file"):
        hosts_from({"PBS_NODEFILE": str(tmp_path / "124.pbs")})


SUMMIT = {"LSB_MCPU_HOSTS": "batch2 1 h41n04 42 h41n08 42", "LSB_HOSTS": "batch2 h41n04 h41n08"}


def test_lsf(tmp_path: Path):
    origin, hosts = hosts_from(SUMMIT)
    assert hosts == [Host("h41n04", 42), Host("h41n08", 42)] and "without batch2" in origin and "tasks" in origin
    assert hosts_from({"LSB_MCPU_HOSTS": "grid03 1 grid05 1 grid01 2"})[1][0] == Host("grid03", 1)
    assert hosts_from({"LSB_HOSTS": "hostA hostA hostB"})[1] == [Host("hostA", 2), Host("hostB", 1)]
    request = "select[type == local] order[r15s:pg] rusage[mem=1000.00,ngpus_physical=4.00] span[ptile=16]"
    origin, hosts = hosts_from({"LSB_MCPU_HOSTS": "hostA 16 hostB 16", "LSB_EFFECTIVE_RSRCREQ": request})
    assert hosts == [Host("hostA", 4), Host("hostB", 4)] and "ngpus_physical=4" in origin
    per_task = request.replace("4.00", "4.00/task")
    assert hosts_from({"LSB_HOSTS": "hostA hostA", "LSB_EFFECTIVE_RSRCREQ": per_task})[1] == [Host("hostA", 2)]
    file = tmp_path / "1234.hostfile"
    file.write_text("batch3\n" + "a01n01\n" * 40 + "a01n02\n" * 40)
    assert hosts_from({**SUMMIT, "LSB_DJOB_HOSTFILE": str(file)}, slots=6)[1] == [Host("a01n01", 6), Host("a01n02", 6)]
    for wrong in ("hostA", "hostA x", "hostA 1 hostB"):
        with pytest.raises(UserError, match="LSB_MCPU_HOSTS='host"):
            hosts_from({"LSB_MCPU_HOSTS": wrong})


def test_sge(tmp_path: Path):
    file = tmp_path / "pe_hostfile"
    file.write_text(
        "compute-0-1.local 4 all.q@compute-0-1.local UNDEFINED\n"
        "compute-0-2.local 8 all.q@compute-0-2.local <NULL>\n"
        "compute-0-1.local 4 gpu.q@compute-0-1.local 0,0:0,1\n"
    )
    environ = {"PE_HOSTFILE": str(file), "JOB_ID": "17"}
    origin, hosts = hosts_from(environ)
    assert hosts == [Host("compute-0-1.local", 8), Host("compute-0-2.local", 8)] and origin.startswith("sge: 2")
    for name, ids, number in (("SGE_HGR_gpu", "0 1", 2), ("SGE_HGR_gpu_card", "GPU0,GPU1,GPU2", 3)):
        origin, hosts = hosts_from({**environ, name: ids})
        assert hosts[1] == Host("compute-0-2.local", number) and f"{name}={ids} (GPUs of this host" in origin
    file.write_text("compute-0-1.local\n")
    with pytest.raises(UserError, match="'compute-0-1.local' is not of the form: host slots queue processors"):
        hosts_from(environ)


def test_mpijob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "hostfile"
    names = [f"vit-worker-{i}.vit.research.svc" for i in (0, 1)]
    environ = {"K_MPI_JOB_ROLE": "launcher", "OMPI_MCA_orte_default_hostfile": str(file)}
    for form in ("{} slots=8\n", "{}:8\n"):
        file.write_text("".join(form.format(name) for name in names))
        origin, hosts = hosts_from(environ)
        assert hosts == [Host(name, 8) for name in names]
        assert origin == f"mpijob: 2 host(s) by {file}, 16 slot(s) by slotsPerWorker in {file}"
    monkeypatch.setattr(schedulers, "MPI_HOSTFILE", str(file))
    assert hosts_from({"K_MPI_JOB_ROLE": "launcher"})[1] == hosts_from({}, "mpijob")[1] == hosts
    assert hosts_from({"I_MPI_HYDRA_HOST_FILE": str(file)})[1] == hosts
    file.write_text("\n".join(names))  # as the operator once wrote it
    assert hosts_from({**environ, "OMPI_MCA_orte_set_default_slots": "4"})[1][1] == Host(names[1], 4)
    with pytest.raises(UserError, match="is neither `HOST slots=N` nor `HOST:N`"):
        hosts_from(environ)


def test_which_scheduler(tmp_path: Path):
    with pytest.raises(UserError) as error:
        hosts_from({"PATH": "/bin"})
    for name, (variables, _) in schedulers.SCHEDULERS.items():
        assert name in str(error.value) and all(variable in str(error.value) for variable in variables)
    slurm = {**TWO, "SLURM_GPUS_ON_NODE": "8"}
    assert hosts_from({**slurm, "OMPI_MCA_orte_default_hostfile": "mine"})[0].startswith("slurm")
    for other in ({"LSB_HOSTS": "a"}, {"K_MPI_JOB_ROLE": "launcher"}):
        with pytest.raises(UserError, match="may be a job of slurm or of (lsf|mpijob); say which: --from slurm"):
            hosts_from({**slurm, **other})
    assert hosts_from({**slurm, "LSB_HOSTS": "a"}, "lsf")[1] == [Host("a", 1)]
    with pytest.raises(UserError, match=r"--from: 'slrum' is not known \(did you mean 'slurm'\?\)"):
        hosts_from(slurm, "slrum")
    with pytest.raises(UserError, match="no job of pbs: PBS_NODEFILE"):
        hosts_from(slurm, "pbs")


@pytest.mark.parametrize(
    "environ",
    [
        {"LSB_HOSTS": "a b;reboot"},
        {"LSB_MCPU_HOSTS": "$(reboot) 4"},
        {"SLURM_JOB_NODELIST": "a`reboot`", "SLURM_GPUS_ON_NODE": "8"},
    ],
)
def test_no_name_that_a_shell_would_run(environ: dict[str, str]):
    with pytest.raises(UserError, match="is not a host name"):
        hosts_from(environ)


def verb(*words: str) -> int:
    parser = argparse.ArgumentParser()
    schedulers.add_verb(parser.add_subparsers())
    return schedulers.run(parser.parse_args(["hostfile", *words]))


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in [name for variables, _ in schedulers.SCHEDULERS.values() for name in variables]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h100:8")
    said = "slurm: 2 host(s) by SLURM_JOB_NODELIST, 16 slot(s) by SLURM_GPUS_PER_NODE=h100:8 (GPUs)"
    text = f"# by vitds hostfile; {said}\ngpu1 slots=8\ngpu2 slots=8\n"
    assert verb() == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (text, f"vitds hostfile: {said}\n")
    path = tmp_path / "hostfile"
    assert verb("--output", str(path)) == 0
    assert capsys.readouterr().out == "" and path.read_text() == text
    assert verb("--check", str(path), "--json") == 0
    rows = [{"name": "gpu1", "slots": 8}, {"name": "gpu2", "slots": 8}]
    found = json.loads(capsys.readouterr().out)
    assert (found["hosts"], found["slots"]) == (rows, 16)
    assert verb("--json", "--slots", "2", "--from", "slurm") == 0
    assert json.loads(capsys.readouterr().out)["slots"] == 4
    with pytest.raises(UserError, match="--check"):
        verb("--check", str(path), "--slots", "2")
    assert read_hostfile(path) == [Host("gpu1", 8), Host("gpu2", 8)]
