"""Hostfiles: what DeepSpeed would misread is refused, with the line and the right form; what is written reads back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitds.cluster import hostfile
from vitds.cluster.hostfile import Host, check_host_name, format_hostfile, read_hostfile, write_hostfile
from vitds.errors import UserError


def reading(folder: Path, content: str | bytes) -> list[Host]:
    path = folder / "hostfile"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_hostfile(path)


def test_reads_what_people_write(tmp_path: Path):
    text = "# the cluster\r\n\r\n  node-01   slots=8\r\nnode-02.example.org\tslots=4   # two are broken\r\n10.0.0.3 slots=1\r\n# é\r\n"
    assert reading(tmp_path, text) == [Host("node-01", 8), Host("node-02.example.org", 4), Host("10.0.0.3", 1)]


def test_the_example_is_a_hostfile():
    assert read_hostfile(Path(__file__).parents[2] / "hostfile.example") == [Host("node-01", 8), Host("node-02", 8)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("node-01:8", "write: node-01 slots=8"),
        ("node-01", "write: node-01 slots=8"),
        ("node-01 slot=4", "write: node-01 slots=4"),
        ("node-01 slots = 4", "write: node-01 slots=4"),
        ("node-01, slots=4", "'node-01,' is not a host name: ',' has no place there"),
        ("slots=4 node-01", "write: node-01 slots=4"),
        ("node-01 slots=4 max_slots=4", "write: node-01 slots=4"),
        ("node-01 slots=", "slots= of 'node-01' is not a whole number"),
        ("node-01 slots=8x", "slots=8x of 'node-01' is not a whole number"),  # 8 to DeepSpeed
        ("node-01 slots=-1", "slots=-1 of 'node-01' is not a whole number"),
        ("node-01 slots=٨", "is not a whole number"),  # a digit to int()
        ("node-01 slots=0", "slots=0 of 'node-01': 1 to 1024 are allowed; to leave the host out, remove its line"),
        ("node-01 slots=100000", "1 to 1024"),
        ("-oProxyCommand=reboot slots=8", "ssh would take it for an option"),
        ("root@node-01 slots=8", "the user into ~/.ssh/config"),
        ("node[01-04] slots=8", "ranges are not expanded here"),
        ("fe80::1 slots=8", "no ports or IPv6 addresses"),
        ("node;reboot slots=8", "';' has no place there"),
        ("$(reboot) slots=8", "'$' has no place there"),
        ("`reboot` slots=8", "has no place there"),
        ("nоde slots=8", r"'n\u043ede' is not a host name"),  # a Cyrillic о
        ("n" * 254 + " slots=8", "it has 254 characters"),
    ],
)
def test_a_bad_line_is_named_and_put_right(tmp_path: Path, line: str, said: str):
    with pytest.raises(UserError) as error:
        reading(tmp_path, f"# hosts\nnode-00 slots=8\n{line}\n")
    assert str(error.value).startswith(f"{tmp_path}/hostfile:3: ")
    assert said in str(error.value)


def test_a_host_has_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"hostfile:4: host 'NODE-1.' is on line 2 already"):
        reading(tmp_path, "#\nnode-1 slots=8\nnode-2 slots=8\nNODE-1. slots=8\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "hostfile: names no host; write one a line, as in: node-01 slots=8"),
        ("# node-01 slots=8\n", "names no host"),
        (b"\xef\xbb\xbfnode-01 slots=8\n", "hostfile:1: begins with a byte order mark"),
        (b"node-01 slots=8\n\x7fELF\x00\x01", "hostfile:2: is not text"),
        ("node-01 slots=8\n".encode("utf-16"), "hostfile:1: is not text"),
    ],
)
def test_what_is_no_hostfile(tmp_path: Path, content: str | bytes, said: str):
    with pytest.raises(UserError) as error:
        reading(tmp_path, content)
    assert said in str(error.value)


def test_a_mistyped_path_is_an_error(tmp_path: Path):
    (tmp_path / "hostfile").write_text("node-01 slots=8\n")
    with pytest.raises(UserError, match=r"hostfiel: no such file \(did you mean 'hostfile'\?\); DeepSpeed would train"):
        read_hostfile(tmp_path / "hostfiel")
    with pytest.raises(UserError, match="nowhere cannot be listed"):
        read_hostfile(tmp_path / "nowhere" / "hostfile")
    with pytest.raises(UserError, match="is a directory"):
        read_hostfile(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile("host\0file")


def test_a_pipe_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "hostfile")
    with pytest.raises(UserError, match="is not a plain file"):
        read_hostfile(tmp_path / "hostfile")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "hostfile"
    path.write_text("node-01 slots=8\n")
    path.chmod(0)
    if os.geteuid() == 0:  # whom no mode keeps out

        def refused(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match="hostfile: cannot be read: Permission denied"):
        read_hostfile(path)


def test_a_huge_file_is_not_read(tmp_path: Path):
    path = tmp_path / "hostfile"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="1099511627776 bytes; that is no hostfile"):
        read_hostfile(path)


def test_a_message_has_an_end(tmp_path: Path):
    with pytest.raises(UserError) as error:
        reading(tmp_path, "n!" * 100_000 + " slots=" + "9" * 100_000)
    assert len(str(error.value)) < 1000


def test_nothing_in_a_message_moves_the_terminal(tmp_path: Path):
    with pytest.raises(UserError) as error:
        reading(tmp_path, "\x1b[2Jnode slots=8\n")
    assert "\x1b" not in str(error.value) and "\\x1b" in str(error.value)


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(
    hosts=st.lists(
        st.builds(Host, NAMES, st.integers(1, 1024)), min_size=1, unique_by=lambda host: host.name.lower().rstrip(".")
    )
)
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, hosts: list[Host]):
    path = tmp_path_factory.getbasetemp() / "hostfile-of-any-hosts"
    path.write_text(format_hostfile(hosts, "by nobody\nevil slots=8"))
    assert read_hostfile(path) == hosts


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=30))
def test_only_plain_names_pass(name: str):
    """Against a rule written another way: what passes means the same to a shell, quoted or not, and is no option."""
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    good = bool(name) and name[0] in plain and set(name) <= plain | set("._-")
    try:
        check_host_name(name, "here")
        passed = True
    except UserError:
        passed = False
    assert passed == good


def test_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "hostfile"
    path.write_text("old slots=1\n")
    before = path.stat().st_ino
    write_hostfile(path, [Host("node-01", 8)], "new")
    assert path.stat().st_ino != before  # a reader of the old one has all of it
    assert path.read_text() == "# new\nnode-01 slots=8\n" and os.listdir(tmp_path) == ["hostfile"]


def test_a_bad_list_is_not_written(tmp_path: Path):
    path = tmp_path / "hostfile"
    path.write_text("old slots=1\n")
    for hosts in ([], [Host("a b", 1)], [Host("a", 0)], [Host("a", 1), Host("A", 1)]):
        with pytest.raises(UserError):
            write_hostfile(path, hosts)
    assert path.read_text() == "old slots=1\n"


def test_a_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "hostfile"
    path.write_text("old slots=1\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hostfile.os, "fsync", full)
    with pytest.raises(UserError, match="hostfile: cannot be written: No space left on device"):
        write_hostfile(path, [Host("node-01", 8)])
    assert path.read_text() == "old slots=1\n"
    assert os.listdir(tmp_path) == ["hostfile"]
    with pytest.raises(UserError, match="is a directory"):
        write_hostfile(tmp_path, [Host("node-01", 8)])


def test_a_comment_makes_no_host():
    assert format_hostfile([Host("a", 1)], "x\nb slots=1\r\nc slots=1") == "# x\n# b slots=1\n# c slots=1\na slots=1\n"
