"""Every damage done to every file of a checkpoint; what a resume then does. As a script it prints the counts.

A damaged checkpoint of step 24 lies beside a good one of step 12. A cell is "passed over" when the damaged one is named,
with the bad file, and the older one taken; "refused" when the start ends with such a message. Nothing else will do, and
no byte of the directory may change.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoint_ranks import EXTRA, SMALL_FILES, TRAINING_STATE, logical, shards

from vitds.checkpoint import Saver, newest_checkpoint
from vitds.checkpoint.format import EMA, MODEL, OPTIMIZER
from vitds.errors import UserError

FLIPS = 16
"""Single bits flipped in each file, one at a time, the places drawn with the file's name as the seed; the script: 256."""

Damage = Callable[[Path], Iterator[None]]
"""Damages a file, yields for the trial, and mends it; once per trial."""


def averaged_checkpoint(directory: Path, step: int, offset: float = 0.0) -> Path:
    """A checkpoint with an average, every kind in several files, written by a world of one."""
    weights, state = (shards(tensors, 0, 1) for tensors in logical())
    average = shards({name: tensor + offset for name, tensor in logical()[0].items()}, 0, 1)
    saver = Saver(directory, **SMALL_FILES)
    saver.begin(
        step, {MODEL: weights, EMA: average, OPTIMIZER: state}, {**TRAINING_STATE, "step": step, "world_size": 1}, EXTRA
    )
    return saver.commit().path


def _content(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> Iterator[None]:
        before = path.read_bytes()
        path.write_bytes(change(before))
        yield
        path.write_bytes(before)

    return damage


def _moved(replace: Callable[[Path, Path], object]) -> Damage:
    """The file is taken away, and `replace(path, kept)` puts something in its place."""

    def damage(path: Path) -> Iterator[None]:
        kept = path.parent.parent.parent / "outside" / path.name
        kept.parent.mkdir(exist_ok=True)
        os.rename(path, kept)
        replace(path, kept)
        yield
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        os.rename(kept, path)

    return damage


def _flips(path: Path) -> Iterator[None]:
    before = path.read_bytes()
    for bit in random.Random(path.name).sample(range(8 * len(before)), min(FLIPS, 8 * len(before))):
        data = bytearray(before)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield
    path.write_bytes(before)


DAMAGES: dict[str, Damage] = {
    "bit flipped": _flips,
    "last two bytes cut off": _content(lambda data: data[:-2]),
    "cut to half": _content(lambda data: data[: len(data) // 2]),
    "emptied": _content(lambda data: b""),
    "a byte added": _content(lambda data: data + b"\0"),
    "zeros of its length": _content(lambda data: bytes(len(data))),
    "first and last swapped": _content(lambda data: data[-1:] + data[1:-1] + data[:1]),
    "missing": _moved(lambda path, kept: None),
    "a directory": _moved(lambda path, kept: path.mkdir()),
    "a link out of the directory": _moved(lambda path, kept: path.symlink_to(kept)),
    "a dead link": _moved(lambda path, kept: path.symlink_to("nowhere")),
    "a pipe": _moved(lambda path, kept: os.mkfifo(path)),
    "another checkpoint's": _moved(
        lambda path, kept: shutil.copy(path.parent.parent.parent / "foreign" / path.name, path)
    ),
}


def prepared(root: Path) -> Path:
    """A run's `checkpoints/` under `root` with steps 12 and 24; and, elsewhere, the files of another run's step 24."""
    averaged_checkpoint(root / "checkpoints", 12)
    averaged_checkpoint(root / "checkpoints", 24)
    foreign = averaged_checkpoint(root / "other", 36, offset=1.0)
    os.rename(foreign, root / "foreign")
    for path in (root / "foreign").iterdir():  # of the same lengths where possible, and not one of them equal
        if path.read_bytes() == (root / "checkpoints" / "step-000000024" / path.name).read_bytes():
            path.write_bytes(path.read_bytes()[:-2] + b"??")
    return root / "checkpoints"


def files(checkpoints: Path) -> list[str]:
    """The names of the files in the newer checkpoint."""
    return sorted(path.name for path in (checkpoints / "step-000000024").iterdir())


def snapshot(directory: Path) -> dict[str, bytes | str]:
    """Every name below a directory, with its content or what it is."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else os.readlink(path)
        if path.is_symlink()
        else "directory"
        if path.is_dir()
        else "pipe"
        for path in sorted(directory.rglob("*"))
    }


def outcomes(checkpoints: Path, name: str, damage: str) -> Counter[str]:
    """What a start does in each trial of one cell; anything but "refused" and "passed over" is a failure, in words."""
    found: Counter[str] = Counter()
    path = checkpoints / "step-000000024" / name
    for _ in DAMAGES[damage](path):
        before = snapshot(checkpoints)
        found[_outcome(checkpoints, name)] += 1
        assert snapshot(checkpoints) == before, f"{name}: {damage}: a start changed the directory"
    return found


def _outcome(checkpoints: Path, name: str) -> str:
    said: list[str] = []
    try:
        taken = newest_checkpoint(checkpoints, report=said.append)
    except UserError as error:
        return "refused" if f"step-000000024/{name}" in str(error) else f"no name in: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if taken is None or taken.step != 12:
        return "not noticed"
    # A flipped bit in the manifest may lie in a file's name, length or sum: then it is that file that looks wrong.
    words = "step-000000024/" + ("" if name == "manifest.json" else name)
    return "passed over" if words in said[0] else f"no name in: {said}"


def main() -> int:
    """Print the matrix: trials of each cell, all of which ended well, or what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = prepared(Path(scratch))
        names = files(checkpoints)
        wrong, total = 0, Counter[str]()
        print("| damage | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
        for damage in DAMAGES:
            cells = []
            for name in names:
                found = outcomes(checkpoints, name, damage)
                total += found
                bad = {words: count for words, count in found.items() if words not in ("refused", "passed over")}
                wrong += sum(bad.values())
                cells.append(str(bad) if bad else f"{found.total()}/{found.total()}")
            print(f"| {damage} | " + " | ".join(cells) + " |")
        told = ", ".join(f"{total[words]} {words}" for words in ("passed over", "refused"))
        print(f"\n{total.total()} trials: {told}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    FLIPS = 256
    sys.exit(main())
