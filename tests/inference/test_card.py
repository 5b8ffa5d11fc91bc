"""The model card: what the hub reads of it, what people read, and that no private path is in it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from tests.inference.kinds import saved, tiny
from tests.launching import train
from vitds.checkpoint.facts import data_name, facts
from vitds.checkpoint.progress import Progress
from vitds.models import (
    ModelSection,
    Training,
    VitdsImageProcessor,
    ViTForImageClassification,
    build_config,
    model_card,
)

RESOLVED: dict[str, Any] = {
    "train_batch_size": 128, "gradient_clipping": 1.0, "bf16": {"enabled": True},
    "optimizer": {"type": "ModifiedAdafactor", "params": {"lr": 8e-4, "beta2": None}},
    "scheduler": {"type": "rsqrt", "params": {"warmup_steps": 10}},
    "vitds": {
        "train": {"seed": 7},
        "data": {
            "train": {"source": "tar", "path": "/somewhere/private/jft|3b/train", "transforms": []},
            "eval": {"source": "folder", "path": "/somewhere/private/imagenet-v2"}, "mixup": 0.2,
        },
        "init_from": {"what": "ema", "path": "/somewhere/private/step-000000500"},
    },
}  # fmt: skip
EVALUATION = {
    "eval/top1": 0.875, "eval/top5": 0.96, "eval/loss": 0.5, "eval/images": 80.0, "eval_ema/top1": 0.9, "eval_ema/loss": math.nan,
    "minival/top1": None, "fewshot/pets_10shot": 0.75, "fewshot/pets_10shot_seed0": 0.7,
}  # fmt: skip
IMAGES = {"train": {"images": 1000}, "eval": {"images": 80}}


def told(evaluated: int = 20, **more: Any) -> Training:
    progress = Progress(step=20, images_seen=2560, evaluated=evaluated, evaluation=EVALUATION)
    return facts(RESOLVED, progress, 40, IMAGES, {"vitds": "0.1.0"}, **more)


def card(**more: Any) -> str:
    return model_card(build_config(ModelSection(variant="ViT-S/16")), told(**more))


def test_the_hub_reads_its_front_matter() -> None:
    read = ModelCard(card())
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "image-classification")
    found = {(one.dataset_name, one.metric_name): one.metric_value for one in read.data.eval_results}
    assert found == {
        ("imagenet-v2", "top-1"): 0.875, ("imagenet-v2", "top-5"): 0.96, ("imagenet-v2", "top-1, averaged weights"): 0.9,
        ("pets", "linear probe, 10 images of a class"): 0.75,
    }  # fmt: skip
    assert {one.metric_type for one in read.data.eval_results} == {"accuracy"}
    assert ModelCard(model_card(build_config(ModelSection(num_classes=0)))).data.pipeline_tag is None


def test_results_of_other_weights_are_not_in_the_index() -> None:
    text = card(evaluated=15)
    assert ModelCard(text).data.eval_results is None
    assert "## Evaluation (of the weights at step 15)" in text and "| 87.50% |" in text


def test_people_read_how_it_came_about() -> None:
    text = card()
    with torch.device("meta"):
        model = ViTForImageClassification(build_config(ModelSection(variant="ViT-S/16")))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for line in (
        "- Trained on jft|3b/train, 1,000 images", "- Evaluated on imagenet-v2, 80 images",
        "- steps: 20 of 40, 128 images each", "- images seen: 2,560 (2.56 epochs)",
        "- optimizer: ModifiedAdafactor (lr 0.0008)", "- schedule: rsqrt (warmup_steps 10)",
        "- precision: bf16, fp32 master weights", "- training transforms: []", "- mixup: 0.2",
        "- started from: ema of step-000000500", "| imagenet-v2 | loss | 0.5 |", "| pets | linear probe, 10 images of a class | 75.00% |",
        f" {parameters:,} parameters.", "vitds predict --checkpoint",
    ):  # fmt: skip
        assert line in text, line
    assert "private" not in text and "None" not in text and "| nan |" not in text and "seed0" not in text
    assert "expect other figures" in card(evaluation_transforms=["random_crop"])


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"source": "digits"}, "digits"),
        ({"source": "hf", "path": "/a/b/flowers", "split": "test"}, "flowers, test"),
        ({"source": "folder", "path": "val"}, "val"),
        ({"source": "tar", "path": "/a/shards/train-{000..009}.tar"}, "train-{000..009}.tar"),
    ],
)
def test_names_of_data(section: dict[str, Any], name: str) -> None:
    assert data_name(section) == name


def test_a_state_of_few_words_has_a_card() -> None:
    """A caller of the checkpoints that keeps less of a run file."""
    few = facts({"vitds": {}, "optimizer": {"type": "SGD"}, "train_batch_size": 4}, Progress(), 5, {}, {})
    assert "- optimizer: SGD\n" in model_card(build_config(ModelSection()), few)


@pytest.mark.launch
def test_what_a_run_writes_is_a_repository(tmp_path: Path) -> None:
    """Card, labels and pipeline of a checkpoint that training has written."""
    few = ["vitds.train.total_steps=6", "scheduler.params.warmup_steps=1", "scheduler.params.cooldown_steps=1"]
    done = train(1, "ds_configs/digits.json", tmp_path / "run", *few, "vitds.checkpoint.every_steps=3")
    assert done.returncode == 0, done.stdout
    first, last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert "## Evaluation" not in (first / "README.md").read_text()
    read = ModelCard.load(last / "README.md")
    stored = json.loads((last / "training_state.json").read_text())["evaluation"]
    found = {one.metric_name: one.metric_value for one in read.data.eval_results}
    assert (found["top-1"], found["top-5"]) == (stored["eval/top1"], stored["eval/top5"])
    assert "Trained on digits, 1,437 images" in read.text and str(tmp_path) not in read.text
    pipeline = transformers.pipeline("image-classification", model=str(last))
    assert sorted(pipeline.model.config.id2label.values()) == [str(digit) for digit in range(10)]
    assert pipeline.model.config.problem_type == "multi_label_classification"


def test_the_loss_says_which_scores(tmp_path: Path) -> None:
    for loss, classes, expected in (
        ("softmax", 3, "single_label_classification"),
        ("sigmoid", 3, "multi_label_classification"),
        ("softmax", 1, None),
    ):
        path = saved(tmp_path / f"{loss}{classes}", tiny(classes, loss), VitdsImageProcessor(16, 16))
        assert transformers.AutoConfig.from_pretrained(path).problem_type == expected
