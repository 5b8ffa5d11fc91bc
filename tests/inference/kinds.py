"""Image files of every kind that training reads, as bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from vitds.data import SourceSection
from vitds.data.source import Sample, Source
from vitds.models import ViTConfig, VitdsImageProcessor, ViTForImageClassification

KINDS = (
    "L", "LA", "RGB", "RGBA", "1", "P", "P transparent", "RGB transparent", "I;16", "CMYK", "webp", "bmp", "jpeg grey",
    *(f"turned {i}" for i in range(1, 9)), "turned alpha", "bad exif",
)  # fmt: skip


def encoded(kind: str, width: int, height: int, seed: int) -> bytes:
    """A file of that kind with noise in it."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgb, written = Image.fromarray(pixels[..., :3]), io.BytesIO()
    if kind in ("L", "LA", "RGB", "RGBA", "1"):
        image = {"L": rgb.convert("L"), "1": rgb.convert("1"), "RGB": rgb, "RGBA": Image.fromarray(pixels, "RGBA")}.get(
            kind
        )
        image = image or Image.merge("LA", [rgb.convert("L"), Image.fromarray(pixels[..., 3])])
        image.save(written, "PNG")
    elif kind == "P":
        rgb.quantize(8).save(written, "PNG")
    elif kind == "P transparent":
        rgb.quantize(8).save(written, "PNG", transparency=bytes([0, 100, 255, 30, 7]))
    elif kind == "RGB transparent":
        pixels[:, ::2, :3] = (10, 20, 30)
        Image.fromarray(pixels[..., :3]).save(written, "PNG", transparency=(10, 20, 30))
    elif kind == "I;16":
        Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16)).save(written, "PNG")
    elif kind == "CMYK":
        Image.fromarray(pixels, "CMYK").save(written, "JPEG")
    elif kind == "webp":
        Image.fromarray(pixels, "RGBA").save(written, "WEBP", lossless=True)
    elif kind == "bmp":
        rgb.save(written, "BMP")
    elif kind == "jpeg grey":
        rgb.convert("L").save(written, "JPEG")
    else:
        exif = Image.Exif()
        exif[0x0112] = 6 if kind == "turned alpha" else int(kind.split()[1]) if kind.startswith("turned") else 6
        data = exif.tobytes()
        if kind == "bad exif":  # cut short within its table
            data = data[:14]
        if kind == "turned alpha":
            Image.fromarray(pixels, "RGBA").save(written, "PNG", exif=data)
        else:
            rgb.save(written, "JPEG", exif=data)
    return written.getvalue()


class Held(Source):
    """These samples."""

    def __init__(self, samples: list[Sample], class_names: list[str], multi_label: bool = False) -> None:
        self.samples, self.class_names, self.multi_label = samples, class_names, multi_label

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample:
        return self.samples[index]


ANY = SourceSection("synthetic")
"""Where a section is asked for and its source is already there."""


def tiny(classes: int = 3, loss: str = "softmax", image_size: int = 16, **more: object) -> ViTForImageClassification:
    """A model with weights that tell images apart."""
    config = ViTConfig(
        width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=8, image_size=image_size, num_classes=classes, loss=loss,
        architectures=["ViTForImageClassification"], **more,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    for name in model.shapes:
        model.get_parameter(name).data.copy_(model.initial_tensor(name, 3))
    model.head.weight.data.normal_(0, 2)
    return model.eval()


def saved(path: object, model: ViTForImageClassification, processor: VitdsImageProcessor) -> str:
    """A directory as transformers writes it."""
    model.save_pretrained(str(path))
    processor.save_pretrained(str(path))
    return str(path)
