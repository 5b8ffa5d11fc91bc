"""The run file's `vitds.data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitds.data.minival import check_minival
from vitds.data.sources import SOURCES
from vitds.data.transforms import check_transforms, eval_default
from vitds.errors import UserError, one_of
from vitds.sections import check_least, key


@dataclass(frozen=True)
class SourceSection:
    """Where images come from and what is done to them."""

    source: str = key(doc="Name of a source: digits, synthetic, folder, tar, hf.")
    path: str | None = key(
        None,
        "Folder of one folder per class (source folder); tar shards as a file, a folder of them or a pattern with braces "
        "and wildcards, as in shards/train-{000000..001023}.tar (source tar); directory of a data set (source hf).",
    )
    index_dir: str | None = key(None, "Directory of the indices of tar shards; beside the shards when absent.")
    classes: str | None = key(
        None, "File of the class names, one a line or a JSON list, in the order of their numbers (sources tar and hf)."
    )
    label_key: str | None = key(
        None,
        "Key of the label in the JSON of a tar's image, or column of a data set; label, labels or cls when absent.",
    )
    image_key: str | None = key(None, "Column of a data set's images; its only Image column when absent (source hf).")
    exclude: str | None = key(None, "File that names images to leave out, as `vitds data dedup` writes it.")
    split: str | None = key(
        None,
        "Which part of the digits (train, eval) or of a data set; that of the role when absent (of a data set: train; the "
        "first there is of validation, eval, test).",
    )
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
class OrderSection:
    """In which order the training stream visits the images; every epoch is another permutation of all of them."""

    kind: str = key(
        "full",
        "full: any image may follow any other. windowed: neighbours in storage are read together, for disks and object "
        "mounts; the images must be stored shuffled, as `vitds data pack` does (docs/data.md).",
        choices=("full", "windowed"),
    )
    run_images: int = key(16, "Neighbours that stay together and are read in one piece (windowed).")
    block_images: int = key(1024, "Neighbours that are visited within one window (windowed).")
    window_blocks: int = key(64, "Blocks from anywhere whose runs are mixed with each other, at most (windowed).")

    def __post_init__(self) -> None:
        check_least("vitds.data.order", self, run_images=1, block_images=1, window_blocks=1)
        if self.block_images % self.run_images:
            raise UserError(
                f"vitds.data.order.block_images: {self.block_images} is no multiple of run_images ({self.run_images})"
            )


@dataclass(frozen=True)
class DataSection:
    """The training stream and the images of the evaluation."""

    train: SourceSection = key(doc="The training images.")
    eval: SourceSection | None = key(None, "The images of the evaluation; none, no evaluation.")
    order: OrderSection = key(OrderSection(), "The order of the training stream.")
    minival: float = key(
        0.0,
        "Training images that are not trained on but evaluated (minival/…): below 1 a share of them, from 1 on their number; the "
        "same ones whatever the seed.",
    )
    mixup: float = key(0.0, "Mixup: p of the Beta(p, p) from which each step draws its mixing weight; 0 mixes nothing.")
    num_workers: int = key(0, "Processes per rank that prepare images; 0 prepares them in the training process.")
    prefetch: int = key(2, "Micro-batches that each worker keeps ready.")
    max_bad_samples: int = key(
        100, "Images that cannot be decoded or have a wrong label, over the whole run; one more stops it."
    )

    def __post_init__(self) -> None:
        check_minival(self.minival)
        check_least("vitds.data", self, mixup=0, num_workers=0, prefetch=1, max_bad_samples=0)

    def processor(self, image_size: int) -> dict[str, Any]:
        """Arguments of the image processor that does what evaluation does (vitds.models.VitdsImageProcessor).

        It can resize once and then cut out the middle. Of other transforms it is told, and does the default. Where evaluation
        takes images as they are (an empty list), it makes others fit.
        """
        spec = self.eval.transforms if self.eval is not None else None
        given = check_transforms(eval_default(image_size) if spec is None else spec, "vitds.data.eval.transforms")
        steps = [(name, parameters.get("size", image_size)) for name, parameters in given]
        resizing, cropping = steps[:1], steps[1:]
        if steps in ([], [("central_crop", image_size)]):
            return {"crop_size": image_size, "size": image_size, "do_resize": not steps}
        if resizing[0][0] in ("resize", "resize_small") and cropping in ([], [("central_crop", image_size)]):
            square = resizing[0][0] == "resize"
            edge = resizing[0][1]
            return {"crop_size": image_size, "size": {"height": edge, "width": edge} if square else edge}
        return {"crop_size": image_size, "evaluation_transforms": spec}
