"""NumPy's .npz, read and written a piece at a time: a zip archive of .npy members, stored or deflated.

The formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html and PKWARE's APPNOTE. NumPy has no
bfloat16: JAX's arrays of it come as two-byte voids ('|V2'). An array of Python objects is a pickle, which could run
code, and is refused by its name.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from numpy.lib import format as npy

from vitds.checkpoint.exchange.source import Source
from vitds.checkpoint.files import sync_directory
from vitds.checkpoint.reading import read_one
from vitds.checkpoint.tensorfile import READ_AT_ONCE, StoredTensor, TensorSpec, bytes_of
from vitds.errors import UserError, one_of

DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "V2": torch.bfloat16,
    "i8": torch.int64,
    "i4": torch.int32,
    "u1": torch.uint8,
    "b1": torch.bool,
}
"""NumPy's kind and size of the dtypes that are read, without the byte order."""
WRITTEN = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "|V2"}
HEADER_BYTES = 4096
_HEADER = re.compile(
    r"\{'descr': '([<>|=]?)([A-Za-z])(\d*)', 'fortran_order': (True|False), 'shape': \(((?:\d+,? ?)*)\),? ?\} *\n?"
)
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises of an archive that is not right."""


@dataclass(frozen=True)
class Member:
    """One array of the archive."""

    spec: TensorSpec
    info: zipfile.ZipInfo
    skip: int
    """Bytes of the .npy header before the data."""
    reversed: bool
    """Stored column-major: as the tensor of the reversed axes."""
    stored: StoredTensor | None
    """Where the bytes lie in the file itself; None of a deflated member."""


class Npz(Source):
    """An open archive. Members that are merely stored are read like safetensors: only the bytes asked for."""

    def __init__(self, path: Path) -> None:
        """Read the directory and every header.

        Raises:
            UserError: not an .npz, truncated, a member that is not a plain array, or a dtype that is not read.
        """
        self.path = path
        self._archive = _opened(path)
        self._stream: tuple[str, IO[bytes], int] | None = None
        """The deflated member being read, and the element at which it stands: what comes next needs no new start."""
        self.members: dict[str, Member] = {}
        for info in self._archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in self.members:
                raise UserError(f"{path}: member {info.filename!r} is there twice")
            self.members[name] = self._member(name, info)
        self.specs = {name: member.spec for name, member in self.members.items()}

    def elements(self, name: str, start: int, numel: int) -> torch.Tensor:
        member = self.members[name]
        if member.reversed:
            whole = self._row_major(member, name, 0, member.spec.numel).view(member.spec.shape[::-1])
            return whole.permute(*reversed(range(whole.dim()))).reshape(-1)[start : start + numel]
        return self._row_major(member, name, start, numel)

    def place(self, name: str) -> Any:
        return self.members[name].info.header_offset

    def check(self, names: Collection[str]) -> None:
        """Read members through and compare their sums with the archive's (UserError naming the member)."""
        for name in names:
            info = self.members[name].info
            with self._blaming(info), self._archive.open(info) as file:
                while file.read(READ_AT_ONCE):
                    pass

    def _row_major(self, member: Member, name: str, start: int, numel: int) -> torch.Tensor:
        if member.stored is not None:
            return read_one({name: member.stored}, name, start, numel, None, self.path)
        data = torch.empty(numel, dtype=member.spec.dtype)
        with self._blaming(member.info):
            file = self._standing_at(name, member, start)
            view = bytes_of(data)
            while len(view):
                piece = file.read(min(len(view), READ_AT_ONCE))
                if not piece:
                    raise EOFError("ends too early")
                view[: len(piece)] = piece
                view = view[len(piece) :]
        self._stream = (name, file, start + numel)
        return data

    def _standing_at(self, name: str, member: Member, start: int) -> IO[bytes]:
        """The member's stream before element `start`: one that stands before it goes on, another starts afresh."""
        if self._stream is not None and self._stream[0] == name and self._stream[2] <= start:
            _, file, position = self._stream
            self._stream, skip = None, (start - position) * member.spec.dtype.itemsize
        else:
            if self._stream is not None:
                self._stream[1].close()
            self._stream, file = None, self._archive.open(member.info)
            skip = member.skip + start * member.spec.dtype.itemsize
        while skip:
            passed = len(file.read(min(skip, READ_AT_ONCE)))
            if not passed:
                raise EOFError("ends too early")
            skip -= passed
        return file

    def _member(self, name: str, info: zipfile.ZipInfo) -> Member:
        where = f"{self.path}: member {info.filename!r}"
        if not info.filename.endswith(".npy"):
            raise UserError(f"{where}: not an array (.npy); an .npz of weights holds nothing else")
        with self._blaming(info), self._archive.open(info) as file:
            text, skip = _header(file)
        spec, fortran = _parsed(name, text, where)
        if info.file_size != skip + spec.nbytes:
            raise UserError(
                f"{where}: {info.file_size:,} bytes long, its header promises {skip + spec.nbytes:,}: shape {spec.shape}"
            )
        stored = None
        if info.compress_type == zipfile.ZIP_STORED:
            begin = self._data_offset(info) + skip
            if begin + spec.nbytes > os.path.getsize(self.path):
                raise UserError(f"{where}: lies past the end of the file, which is truncated")
            stored = StoredTensor(spec, self.path, begin)
        return Member(spec, info, skip, fortran and len(spec.shape) > 1, stored)

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """Of a member's first byte: its local header repeats the name, and may have other extra fields."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        return info.header_offset + 30 + name + extra

    @contextlib.contextmanager
    def _blaming(self, info: zipfile.ZipInfo) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except _DAMAGED as error:
            raise UserError(f"{self.path}: member {info.filename!r}: damaged: {error}") from None


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        if start == b"\x93NUMPY":
            raise UserError(f"{path}: one array (.npy), not an .npz of named ones")
        if not start.startswith(b"PK"):
            raise UserError(f"{path}: not an .npz: it begins with {start[:4]!r}, a zip archive with b'PK'")
        return zipfile.ZipFile(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except _DAMAGED as error:
        raise UserError(f"{path}: a zip archive that is truncated or damaged: {error}") from None


def _header(file: IO[bytes]) -> tuple[str, int]:
    """The text of a .npy header, and how many bytes precede the data."""
    start = file.read(8)
    if len(start) < 8 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise EOFError(f"begins with {start!r}, an array with b'\\x93NUMPY' and a version of 1 to 3")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > HEADER_BYTES:
        raise EOFError(f"a header of {length:,} bytes")
    text = file.read(length)
    if len(text) < length:
        raise EOFError("ends within its header")
    return text.decode("latin-1"), 8 + width + length


def _parsed(name: str, text: str, where: str) -> tuple[TensorSpec, bool]:
    """A header as a spec, and whether the data is column-major. Its one form is matched; nothing is evaluated."""
    found = _HEADER.fullmatch(text)
    if found is None:
        raise UserError(f"{where}: its header is not that of a plain array: {text.strip()[:200]}")
    order, letter, size, fortran, axes = found.groups()
    if letter == "O":
        raise UserError(f"{where}: holds Python objects, a pickle that may run code, and is not read")
    if letter + size not in DTYPES:
        raise UserError(one_of(f"{where}: dtype", order + letter + size, DTYPES))
    if order == ">" and size != "1":
        raise UserError(f"{where}: dtype {order + letter + size!r} is big-endian, which is not read")
    shape = tuple(int(axis) for axis in re.findall(r"\d+", axes))
    if len(shape) > 16 or math.prod(shape) >= 2**62:
        raise UserError(f"{where}: impossible shape {str(shape)[:100]}")
    return TensorSpec(name, shape, DTYPES[letter + size]), fortran == "True"


class NpzWriter:
    """A new .npz: arrays one after another, under a temporary name until all are there and on the disk."""

    def __init__(self, path: Path) -> None:
        """Begin. Raises UserError where there is something under that name, OSError as the disk does."""
        if path.exists():
            raise UserError(f"{path}: is there already")
        self.path = path
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by commit or abandon)
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)

    def write(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Iterable[torch.Tensor]) -> None:
        """One array, whose elements come in parts, row-major; each is cast to `dtype`."""
        info = zipfile.ZipInfo(f"{name}.npy")  # of 1980: the same weights make the same file
        info.external_attr = 0o644 << 16
        left = math.prod(shape)
        with self._archive.open(info, "w", force_zip64=True) as member:
            header = {"descr": WRITTEN[dtype], "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for part in parts:
                data = part.detach().to(dtype).contiguous()
                left -= data.numel()
                member.write(bytes_of(data))
        assert left == 0, f"{name}: {left} elements of {shape} did not come"

    def commit(self) -> None:
        """End the archive, sync it, and give it its name."""
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError, ValueError):
            self._archive.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)
