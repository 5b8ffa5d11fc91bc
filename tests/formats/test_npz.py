"""numpy's archives read a piece at a time, whatever is in them; and written as numpy reads them."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats import trees
from vitds.checkpoint.exchange.npz import HEADER_BYTES, Npz, NpzWriter
from vitds.checkpoint.exchange.weights import WeightsFile, open_weights
from vitds.errors import UserError
from vitds.layout import Shard
from vitds.models.formats import Piece


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", "<i8", "|u1", "?"])
def test_any_elements_of_any_array(tmp_path: Path, dtype: str, deflated: bool) -> None:
    """Backwards as well as forwards: a deflated stream has to begin again."""
    rng = np.random.default_rng(0)
    arrays = {
        "a/row": (rng.normal(size=(5, 4, 3)) * 50).astype(dtype),
        "column": np.asfortranarray((rng.normal(size=(6, 7)) * 50).astype(dtype)),
        "none": np.zeros((0, 3), dtype),
        "one": np.array(3).astype(dtype),
    }
    source = Npz(trees.save(tmp_path / "m.npz", arrays, deflated=deflated))
    assert source.shapes == {name: value.shape for name, value in arrays.items()}
    for name in (*arrays, *reversed(arrays)):
        flat = np.ascontiguousarray(arrays[name]).reshape(-1)
        for start in (0, len(flat) // 2, len(flat) // 3, 0):
            for numel in (0, (len(flat) - start) // 2, len(flat) - start):
                read = source.elements(name, start, numel).numpy()
                np.testing.assert_array_equal(read, flat[start : start + numel])
    source.check(arrays)


def test_pieces_are_rows_as_numpy_counts_them(tmp_path: Path) -> None:
    value = np.arange(24, dtype=np.float16).reshape(4, 3, 2)
    source = Npz(trees.save(tmp_path / "m.npz", {"x": value}))
    for piece, expected in ((Piece("x"), value), (Piece("x", 2), value[2]), (Piece("x", (1, 3)), value[1:3])):
        read = source.read(piece)
        assert read.dtype == torch.float32
        np.testing.assert_array_equal(read.numpy(), expected)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[WeightsFile, dict[str, torch.Tensor]]]:
    """The same weights, stored and deflated, block by block and stacked; and the whole tensors."""
    place = tmp_path_factory.mktemp("npz")
    tree = trees.with_class_entry(trees.tree("token"))
    made = []
    for i, (change, deflated) in enumerate(((dict, False), (trees.scanned, False), (trees.scanned, True))):
        weights = WeightsFile(trees.save(place / f"{i}.npz", change(tree), deflated=deflated))
        made.append((weights, {name: weights.read_tensor(name) for name in weights.specs}))
    return made


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_slices_that_ranks_hold(
    opened: list[tuple[WeightsFile, dict[str, torch.Tensor]]], data: st.DataObject
) -> None:
    """Cut anywhere, across q, k and v too, and asked for in any order, they are the whole tensors' elements."""
    weights, whole = data.draw(st.sampled_from(opened))
    names = data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=6))
    shards = []
    for name in names:
        start = data.draw(st.integers(0, len(whole[name])))
        end = data.draw(st.integers(start, len(whole[name])))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        shards.append(Shard(name, weights.specs[name].shape, torch.full((end - start,), torch.nan, dtype=dtype), start))
    weights.read_into(shards)
    for shard in shards:
        expected = opened[0][1][shard.name][shard.start : shard.start + shard.data.numel()]
        assert torch.equal(shard.data.float(), expected)


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return made.getvalue()


def array(text: str, data: bytes = bytes(8), version: int = 1) -> bytes:
    """A .npy with any header."""
    header = text.encode()
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"


def pickled() -> bytes:
    made = io.BytesIO()
    np.savez(made, good=np.ones(3), bad=np.array([{"a": 1}], dtype=object))
    return made.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not an .npz: it begins with b''"),
    "another file": (b"GIF89a", "not an .npz: it begins with b'GIF8'"),
    "a pickle": (b"\x80\x04K\x01.", "not an .npz"),
    "one array": (array(PLAIN), "one array (.npy), not an .npz of named ones"),
    "no directory": (zipped(("a.npy", array(PLAIN)))[:-30], "truncated or damaged"),
    "half a file": (zipped(("a.npy", array(PLAIN, bytes(4000))))[:2000], "truncated or damaged"),
    "objects": (pickled(), "member 'bad.npy': holds Python objects, a pickle that may run code, and is not read"),
    "no array": (zipped(("a.txt", b"x")), "member 'a.txt': not an array (.npy)"),
    "another magic": (zipped(("a.npy", b"\x93NUMPZ" + array(PLAIN)[6:])), "member 'a.npy': damaged: begins with"),
    "another version": (zipped(("a.npy", array(PLAIN, version=9))), "and a version of 1 to 3"),
    "header cut": (zipped(("a.npy", array(PLAIN)[:30])), "ends within its header"),
    "header too long": (zipped(("a.npy", array(" " * (HEADER_BYTES + 1)))), "a header of 4,097 bytes"),
    "code in the header": (
        zipped(("a.npy", array("{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),), }"))),
        "its header is not that of a plain array: {'descr': '<f4'",
    ),
    "records": (
        zipped(("a.npy", array("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (2,), }"))),
        "its header is not that of a plain array",
    ),
    "big-endian": (
        zipped(("a.npy", array(PLAIN.replace("<f4", ">f4")))),
        "dtype '>f4' is big-endian, which is not read",
    ),
    "text": (zipped(("a.npy", array(PLAIN.replace("<f4", "<U1")))), "dtype: '<U1' is not known"),
    "too long": (zipped(("a.npy", array(PLAIN, bytes(9)))), "its header promises"),
    "too short": (zipped(("a.npy", array(PLAIN, bytes(7)))), "its header promises"),
    "huge": (zipped(("a.npy", array(PLAIN.replace("(2,)", "(99999999999, 99999999999)")))), "impossible shape"),
    "twice": (zipped(("a.npy", array(PLAIN)), ("a", array(PLAIN))), "member 'a' is there twice"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_archive_of_arrays_is_one_clear_line(tmp_path: Path, case: str) -> None:
    content, words = BAD[case]
    path = tmp_path / "m.npz"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        Npz(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        WeightsFile(tmp_path / "m.npz")


@pytest.mark.parametrize("deflated", [False, True])
def test_a_flipped_bit_is_found_by_the_archives_own_sums(tmp_path: Path, deflated: bool) -> None:
    tree = trees.scanned(trees.tree("map"))
    kernel = "Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"  # longer than what is read with a header
    path = trees.save(tmp_path / "m.npz", tree, deflated=deflated)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{kernel}.npy")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + info.compress_size - 12] ^= 1
    path.write_bytes(data)
    assert open_weights(path, verify="size").specs
    with pytest.raises(UserError, match=rf"member '{kernel}\.npy': damaged"):
        open_weights(path)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_what_numpy_reads(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.randn(shape)
    writer = NpzWriter(tmp_path / "m.npz")
    writer.write("a/b", shape, dtype, iter([value]) if not shape else iter(value))
    assert not (tmp_path / "m.npz").exists()
    writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]
    read = np.load(tmp_path / "m.npz")["a/b"]
    assert read.shape == shape
    if dtype == torch.bfloat16:
        assert read.dtype == np.dtype("V2")
        read = torch.from_numpy(read.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(read.astype(np.float32), value.to(dtype).float().numpy())
    source = Npz(tmp_path / "m.npz")
    assert torch.equal(source.read(Piece("a/b")), value.to(dtype).float())
    source.check(["a/b"])


def test_the_same_weights_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        writer = NpzWriter(tmp_path / f"{name}.npz")
        writer.write("x", (3,), torch.float32, [torch.arange(3.0)])
        writer.commit()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_nothing_half_written_is_left_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    writer = NpzWriter(path)
    writer.write("x", (3,), torch.float32, [torch.arange(3.0)])
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m.npz.tmp").write_bytes(b"of a writer that was killed")
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="is there already"):
        NpzWriter(path)
    assert path.read_bytes() == b"precious"


def test_an_array_past_four_gibibytes_has_zip64s_fields(tmp_path: Path) -> None:
    """Without writing one: the local header of every member has room for 64 bits, which numpy reads."""
    writer = NpzWriter(tmp_path / "m.npz")
    writer.write("x", (3,), torch.float32, [torch.arange(3.0)])
    writer.commit()
    local = (tmp_path / "m.npz").read_bytes()[:30]
    assert struct.unpack("<I", local[18:22]) == (0xFFFFFFFF,)
