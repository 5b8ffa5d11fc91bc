"""The walk over a tar's headers, against Python's own."""

import io
import os
import tarfile
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.tar.making import write_tar
from vitds.data.tar import members as members_module
from vitds.data.tar.members import Members
from vitds.errors import UserError

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=60)
PATHS = st.lists(NAMES, min_size=1, max_size=6).map("/".join)
FILES = st.lists(
    st.tuples(PATHS, st.binary(max_size=1500), st.sampled_from("0071526")), max_size=8
)  # regular, contiguous, hard link, folder, symbolic link, pipe


def walk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        members = Members(descriptor, str(path))
        return [(member, members.bytes_of(member)) for member in members]
    finally:
        os.close(descriptor)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    FILES,
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from([512, 2048, 1 << 20]),
)
def test_any_tar_is_read_as_python_reads_it(tmp_path, files, form, window):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, data, kind in files:
            about = tarfile.TarInfo(name)
            about.type = kind.encode()
            if kind in "07":
                about.size = len(data)
            elif kind in "12":
                about.linkname = name * 2
            try:
                tar.addfile(about, io.BytesIO(data) if kind in "07" else None)
            except ValueError:  # ustar cannot hold the name
                assert form == tarfile.USTAR_FORMAT
    with tarfile.open(path) as tar:
        expected = [
            (
                member.name.encode(errors="surrogateescape"),
                member.offset_data,
                member.size,
                tar.extractfile(member).read(),
            )
            for member in tar
            if member.isreg()
        ]
    before, members_module.WINDOW = members_module.WINDOW, window
    try:
        found = walk(path)
    finally:
        members_module.WINDOW = before
    assert [(member.name, member.offset, member.size, data) for member, data in found] == expected
    whole = path.read_bytes()
    assert all(member.crc == zlib.crc32(whole[member.offset - 512 : member.offset]) for member, _ in found)


def header(name, size, kind=b"0", magic=b"ustar\x0000", prefix=b""):
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 8**11 else b"%011o " % size
    block[156:157] = kind
    block[257:265] = magic
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_member_of_more_than_eight_gib(tmp_path):
    """Only its header is there, and the hole behind it: sizes beyond octal are numbers, or stand in a pax record."""
    path, size = tmp_path / "a.tar", 8**11 + 5
    for start in (
        header(b"big", size),
        header(b"p", 19, b"x") + b"19 size=8589934597\n" + bytes(493) + header(b"big", 0),
    ):
        with open(path, "wb") as file:
            file.write(start)
            file.seek(-(-size // 512) * 512, os.SEEK_CUR)
            file.write(header(b"next", 3) + b"abc" + bytes(509 + 1024))
        descriptor = os.open(path, os.O_RDONLY)
        found = [(member.name, member.size) for member in Members(descriptor, str(path))]
        os.close(descriptor)
        assert found == [(b"big", size), (b"next", 3)]


def test_older_forms(tmp_path):
    """v7 has no magic and marks a folder by its slash; GNU keeps times where ustar has the name's first part."""
    path = tmp_path / "a.tar"
    blocks = [
        header(b"old", 1, b"\0", b"\0" * 8), b"1" + bytes(511), header(b"dir/", 77, b"\0", b"\0" * 8),
        header(b"gnu", 1, b"0", b"ustar  \0", b"14000000000\0"), b"2" + bytes(511),
        header(b"new", 1, prefix=b"far/away"), b"3" + bytes(511), header(b"label", 5, b"V"), bytes(512),
    ]  # fmt: skip
    path.write_bytes(b"".join(blocks) + bytes(1024))
    assert [(member.name, data) for member, data in walk(path)] == [
        (b"old", b"1"),
        (b"gnu", b"2"),
        (b"far/away/new", b"3"),
    ]
    old = bytearray(header("é".encode(), 0))
    old[148:156] = b"%06o\0 " % (sum(old) - sum(old[148:156]) + 256 - 512)  # added up as signed bytes
    path.write_bytes(bytes(old) + bytes(1024))
    assert [member.name.decode() for member, _ in walk(path)] == ["é"]


@pytest.mark.parametrize("end", [0, 100, 512, 700, 1024, 1100, 1536, 2000, 2048])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path, end):
    whole = write_tar(tmp_path / "a.tar", [("a.jpg", b"1" * 100), ("b.jpg", b"2" * 100)]).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:end])
    with pytest.raises(UserError, match=rf"cut.tar: at offset \d+: it ends at {end} without an end mark"):
        walk(cut)
    cut.write_bytes(whole[:2560])
    assert len(walk(cut)) == 2


def test_what_is_no_tar_is_told(tmp_path):
    path = tmp_path / "a.tar"
    whole = bytearray(write_tar(path, [("a.jpg", b"1" * 600), ("b.jpg", b"2")]).read_bytes())
    whole[1536] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"a.tar: at offset 1536: no header of a tar"):
        walk(path)
    for mode, name in (("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")):
        with tarfile.open(path, mode) as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
        with open(path, "ab") as file:
            file.write(bytes(1024))
        with pytest.raises(UserError, match=rf"a.tar: compressed \({name}\): .*decompress it"):
            walk(path)
    path.write_bytes(header(b"holes.jpg", 512, b"S") + bytes(2048))
    with pytest.raises(UserError, match="a sparse file"):
        walk(path)
    path.write_bytes(header(b"p", 8, b"x") + b"99 path=" + bytes(504 + 2048))
    with pytest.raises(UserError, match="at offset 512: no pax header"):
        walk(path)
