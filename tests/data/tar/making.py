"""Tars for tests."""

import io
import tarfile

import numpy as np
from PIL import Image


def image(number, form="PNG"):
    """A small picture that is another for each number."""
    data = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), (number >> 16, number >> 8 & 255, number & 255), np.uint8)).save(data, form)
    return data.getvalue()


def write_tar(path, members, **options):
    """A tar of (name, bytes) pairs, or of TarInfos without data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def numbered(first, count, label=lambda number: number % 10):
    """Images with integer labels."""
    return [
        pair
        for number in range(first, first + count)
        for pair in ((f"{number:06d}.png", image(number)), (f"{number:06d}.cls", str(label(number)).encode()))
    ]
