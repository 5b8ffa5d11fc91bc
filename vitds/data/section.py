"""The run file's `vitds.data`."""

from __future__ import annotations

from dataclasses import dataclass

from vitds.data.sources import SOURCES
from vitds.data.transforms import check_transforms, eval_default
from vitds.errors import UserError, one_of
from vitds.sections import check_least, key


@dataclass(frozen=True)
class SourceSection:
    """Where images come from and what is done to them."""

    source: str = key(doc="Name of a source: digits, synthetic, folder.")
    path: str | None = key(None, "Folder of one folder per class (source folder).")
    split: str | None = key(None, "Which part of the digits; that of the role when absent.", choices=("train", "eval"))
    num_images: int | None = key(None, "Number of synthetic images; 10000 when absent.")
    num_classes: int | None = key(None, "Number of classes of the synthetic images; 1000 when absent.")
    image_size: int | None = key(None, "Height and width of the synthetic images; 224 when absent.")
    transforms: list | None = key(
        None,
        "Transforms in order, each a name or {name: {parameters}}; by default inception_crop and flip_lr for training, "
        "resize_small to 256/224 of the image size and central_crop for evaluation.",
    )

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UserError(one_of("vitds.data.*.source", self.source, SOURCES))
        for name in ("num_images", "num_classes", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"vitds.data.*.{name}: expected a whole number ≥ 1, found {value}")
        if self.transforms is not None:
            check_transforms(self.transforms, "vitds.data.*.transforms")


@dataclass(frozen=True)
class DataSection:
    """The training stream and the images of the evaluation."""

    train: SourceSection = key(doc="The training images.")
    eval: SourceSection | None = key(None, "The images of the evaluation; none, no evaluation.")
    mixup: float = key(0.0, "Mixup: p of the Beta(p, p) from which each step draws its mixing weight; 0 mixes nothing.")
    num_workers: int = key(0, "Processes per rank that prepare images; 0 prepares them in the training process.")
    prefetch: int = key(2, "Micro-batches that each worker keeps ready.")
    max_bad_samples: int = key(100, "Undecodable images that one rank replaces before the run stops.")

    def __post_init__(self) -> None:
        check_least("vitds.data", self, mixup=0, num_workers=0, prefetch=1, max_bad_samples=0)

    def eval_edge(self, image_size: int) -> int:
        """Shortest edge to which evaluation resizes before it crops: what the saved image processor must do too."""
        spec = self.eval.transforms if self.eval is not None else None
        sizes = dict(check_transforms(eval_default(image_size) if spec is None else spec, "vitds.data.eval.transforms"))
        return int(sizes.get("resize_small", {}).get("size", image_size))
