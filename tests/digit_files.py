"""The embedded digits as files: class folders of PNG, and tars in the order of such a folder."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vitds.data import SourceSection
from vitds.data.digits import Digits


def write_folders(root: Path) -> list[str]:
    """root/train and root/eval, CLASS/NUMBER.png in each. Returns how a run file names them, as overrides."""
    for role in ("train", "eval"):
        digits = Digits(SourceSection("digits"), role)
        for index in range(len(digits)):
            pixels, label, key = digits.read(index)
            path = root / role / str(label) / f"{int(key.split('/')[1]):04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return [
        f"vitds.data.{role}.{key}" for role in ("train", "eval") for key in ("source=folder", f"path={root / role}")
    ]


def write_tars(folder: Path, to: Path, sizes: Sequence[int]) -> None:
    """shard-0.tar, … of so many images each, the last one of the rest: in the folder's order, with numbers as labels."""
    to.mkdir(parents=True)
    files = sorted(folder.glob("*/*.png"))
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(files)], strict=True)):
        with tarfile.open(to / f"shard-{i}.tar", "w") as tar:
            for path in files[start:end]:
                name = f"{path.parent.name}-{path.stem}"
                for extension, data in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                    member = tarfile.TarInfo(f"{name}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
