"""`vitds predict` and `vitds evaluate`, on small models saved as transformers saves them."""

import argparse
import csv
import importlib.util
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.inference.kinds import Held, encoded, saved, tiny
from tests.launching import ROOT, ranks
from vitds.cli import main
from vitds.data.images import decode
from vitds.evaluation.confusion import Confusion
from vitds.inference.confusion_figure import CELLS, cells
from vitds.inference.images import Renumbered
from vitds.inference.opening import add_opening, opened
from vitds.inference.predict import predictions, prepared
from vitds.models import VitdsImageProcessor

NAMES = ["ant", "bee", "cat"]
FILES = {"ant/0.png": "RGBA", "ant/1.png": "L", "bee/0.png": "I;16", "cat/0.png": "RGB", "cat/1.jpg": "turned 6"}


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    net = tiny(3, request.param, init_head_bias=-1.0)
    net.config.name_classes(NAMES)
    return saved(tmp_path_factory.mktemp("model"), net, VitdsImageProcessor(16, 18))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i, (name, kind) in enumerate(FILES.items()):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(encoded(kind, 20 + 5 * i, 30, i))
    return root


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def expected_scores(model: str, paths: list[Path], loss: str) -> np.ndarray:
    """In float64 from the logits, (N, C)."""
    net = transformers.AutoModelForImageClassification.from_pretrained(model)
    processor = VitdsImageProcessor(16, 18)
    images = [decode(path.read_bytes()) for path in paths]
    with torch.no_grad():
        logits = net(**processor(images, return_tensors="pt")).logits.double().numpy()
    if loss == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_predict_says_what_the_pipeline_says(model: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "predict", "--checkpoint", model, str(folder), "--json", "--batch", "2", "--top", "3")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    paths = [folder / name for name in sorted(FILES)]
    assert [answer["image"] for answer in answers] == [str(path) for path in paths]
    pipeline = transformers.pipeline("image-classification", model=model)
    for answer, theirs in zip(answers, pipeline([str(path) for path in paths], top_k=3), strict=True):
        assert [one["label"] for one in answer["predictions"]] == [one["label"] for one in theirs]
        # Not equal: loaded to other addresses, or in other batches, a CPU's kernels may sum otherwise.
        assert [one["score"] for one in answer["predictions"]] == pytest.approx(
            [one["score"] for one in theirs], rel=1e-5
        )
    loss = json.loads((Path(model) / "config.json").read_text())["loss"]
    for answer, row in zip(answers, expected_scores(model, paths, loss), strict=True):
        found = {one["label"]: one["score"] for one in answer["predictions"]}
        assert found == pytest.approx(dict(zip(NAMES, row, strict=True)), rel=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_scores_of_the_same_weights_in_the_same_batches_are_the_pipelines_bit_for_bit(model: str, folder: Path) -> None:
    parser = argparse.ArgumentParser()
    add_opening(parser)
    paths = [folder / name for name in FILES]
    with opened(parser.parse_args(["--checkpoint", model])) as session, ThreadPoolExecutor() as threads:
        own = predictions(session, prepared(threads, session, paths), 3)
        pipeline: Any = transformers.pipeline(
            "image-classification", model=session.model, image_processor=session.processor
        )
        theirs = pipeline([str(path) for path in paths], batch_size=len(paths), top_k=3)
    assert [answer["predictions"] for answer in own] == theirs


def test_predict_names_what_it_cannot_read_and_does_the_rest(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(encoded("RGB", 30, 30, 0)[:200])
    given = [str(tmp_path / "broken.png"), str(tmp_path / "nowhere.jpg"), str(folder / "cat" / "0.png")]
    code, out, err = said(capsys, "predict", "--checkpoint", model, *given, "--top", "1")
    assert code == 1
    assert out.splitlines()[0] == given[2] and len(out.splitlines()) == 2
    assert f"vitds: {given[0]}: " in err and f"vitds: {given[1]}: No such file" in err
    assert said(capsys, "predict", "--checkpoint", model, str(tmp_path / "empty"))[0] == 1
    (tmp_path / "empty").mkdir()
    code, _, err = said(capsys, "predict", "--checkpoint", model, str(tmp_path / "empty"))
    assert code == 2 and "no image in this folder" in err


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = said(capsys, "evaluate", "--json", *arguments)
    assert code == 0
    return json.loads(out)


def test_evaluate_against_the_pipeline(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "classes.csv"
    found = evaluated(
        capsys,
        "--checkpoint",
        model,
        "--images",
        str(folder),
        "--top",
        "1,2",
        "--batch",
        "3",
        "--per-class",
        str(table),
    )
    pipeline = transformers.pipeline("image-classification", model=model)
    best = {name: [one["label"] for one in pipeline(str(folder / name))] for name in FILES}
    within = {k: [name.split("/")[0] in labels[:k] for name, labels in best.items()] for k in (1, 2)}
    assert (found["top1"], found["top2"], found["images"]) == (np.mean(within[1]), np.mean(within[2]), 5)
    rows = list(csv.DictReader(table.open()))
    assert [(row["name"], row["images"]) for row in rows] == [("ant", "2"), ("bee", "1"), ("cat", "2")]
    for row in rows:
        own = [labels[0] for name, labels in best.items() if name.startswith(row["name"])]
        assert float(row["top1"]) == own.count(row["name"]) / len(own)
        wrong = [label for label in own if label != row["name"]]
        assert int(row["confused_images"]) == max((wrong.count(label) for label in wrong), default=0)
        assert (row["confused_with"] in wrong) if wrong else row["confused_with"] == ""
    assert said(capsys, "evaluate", "--checkpoint", model, "--images", str(folder), "--per-class", str(table))[0] == 2


def test_classes_go_by_their_names(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of one of the classes: alone it would be number 0."""
    (tmp_path / "cat").symlink_to(folder / "cat")
    table = tmp_path / "table.json"
    evaluated(capsys, "--checkpoint", model, "--images", str(tmp_path), "--per-class", str(table))
    assert [row["images"] for row in json.loads(table.read_text())] == [0, 0, 2]
    (tmp_path / "dog").symlink_to(folder / "ant")
    code, _, err = said(capsys, "evaluate", "--checkpoint", model, "--images", str(tmp_path))
    assert code == 2 and "1 of 2 classes are not the model's: 'dog'" in err and "--by-number" in err
    found = evaluated(capsys, "--checkpoint", model, "--images", str(tmp_path), "--by-number")
    assert found["images"] == 4


def test_several_labels_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best class is right if it is one of them, for each of them; an image without any counts for nothing."""
    net = tiny(4, "sigmoid")
    model = saved(tmp_path / "model", net, VitdsImageProcessor(16, 18))
    labels, images = [[0, 2], [1], [], [3, 0], [2]], [encoded("RGB", 20, 20, i) for i in range(5)]
    with tarfile.open(tmp_path / "set.tar", "w") as shard:
        for i, (image, numbers) in enumerate(zip(images, labels, strict=True)):
            for name, content in ((f"{i}.png", image), (f"{i}.json", json.dumps({"labels": numbers}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    table = tmp_path / "classes.json"
    found = evaluated(capsys, "--checkpoint", model, "--images", str(tmp_path / "set.tar"), "--top", "2,1", "--batch", "2", "--per-class", str(table))  # fmt: skip
    with torch.no_grad():
        pixels = VitdsImageProcessor(16, 18)([decode(image) for image in images], return_tensors="pt")["pixel_values"]
        order = net(pixels).logits.argsort(dim=1, descending=True).tolist()
    told = [(best, own) for best, own in zip(order, labels, strict=True) if own]
    for k in (1, 2):
        assert found[f"top{k}"] == np.mean([bool({*best[:k]} & {*own}) for best, own in told])
    assert found["images"] == 4 and 0 < found["mean_average_precision"] < 1
    rows = json.loads(table.read_text())
    assert [row["images"] for row in rows] == [2, 1, 2, 1]
    for c, row in enumerate(rows):
        assert row["top2"] == np.mean([bool({*best[:2]} & {*own}) for best, own in told if c in own])


def test_renumbered_labels() -> None:
    source = Held([(b"", 1, "a"), (b"", [0, 1], "b"), (b"", 2, "c")], ["x", "y"])
    labels = [label for _, label, _ in Renumbered(source, [4, 2], list("pqrst")).read_many([0, 1, 2])]
    assert labels[:2] == [2, [4, 2]]
    assert str(labels[2]) == "label 2 is not one of the 2 classes"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib (vitds[plots])")
def test_the_picture_is_written_once(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--checkpoint", model, "--images", str(folder), "--confusion", str(tmp_path / "it.png")]
    assert said(capsys, *arguments)[0] == 0
    assert Image.open(tmp_path / "it.png").width > 500
    before = (tmp_path / "it.png").read_bytes()
    code, _, err = said(capsys, *arguments)
    assert code == 2 and "is there already" in err
    assert (tmp_path / "it.png").read_bytes() == before and os.listdir(tmp_path) == ["it.png"]


def test_a_cell_of_many_classes_shows_the_largest_share() -> None:
    classes = 2 * CELLS + 1
    confusion = Confusion(classes, (1,))
    labels, predicted = [0, 0, 0, 1, classes - 1], [0, 1, 3, 1, 7]
    positive = torch.nn.functional.one_hot(torch.tensor(labels), classes)
    confusion.add(torch.zeros(5, classes), torch.tensor(predicted)[:, None], positive)
    found = cells(confusion)  # three classes in a cell
    assert found.shape == (167, 167)
    assert (found[0, 0], found[0, 1], found[-1, 2], found.sum()) == (
        1.0,
        pytest.approx(1 / 3),
        1.0,
        pytest.approx(7 / 3),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "is not there"),
        (["--images", "digits:test"], "'test' is not known"),
        (["--images", "digits"], "10 of 10 classes are not the model's"),
        (["--images", "digits", "--by-number"], "digits: 10 classes; the model "),
        (["--images", "digits", "--confusion", "a.jpg"], "expected a name that ends with .png"),
        (["--images", "digits", "--per-class", "no/folder/a.csv"], "there is no folder"),
        (["--images", "digits", "--set", "loss"], "expected KEY=VALUE"),
        (["--images", "digits", "--ema"], "model.ema"),
    ],
)
def test_mistakes(model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = said(capsys, "evaluate", "--checkpoint", model, *arguments)
    assert code == 2 and message in err


def test_a_model_without_classifier_is_not_evaluated(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = str(tmp_path / "bare")
    assert main(["convert", "--from", model, "--to", "vitds", "--classes", "0", "--output", bare]) == 0
    code, _, err = said(capsys, "evaluate", "--checkpoint", bare, "--images", "digits")
    assert code == 2 and "this model has no classifier" in err


@pytest.mark.parametrize("name", ["it.csv", "it.json"])
def test_a_table_that_cannot_be_written_is_one_line(
    model: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["evaluate", "--checkpoint", model, "--images", str(folder), "--per-class", str(tmp_path / name)]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        code, _, err = said(capsys, *arguments)
    assert code == 2 and "cannot be written: [Errno 28]" in err and not [*tmp_path.iterdir()]
    (tmp_path / name).symlink_to(tmp_path / "nothing")
    code, _, err = said(capsys, *arguments)
    assert code == 2 and "is there already" in err and (tmp_path / name).is_symlink()


def test_unusable_images_of_a_verb_are_not_said_to_lie_in_a_run(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for i in range(2):
        (tmp_path / "ant").mkdir(exist_ok=True)
        (tmp_path / "ant" / f"{i}.png").write_bytes(b"nothing")
    words = ["evaluate", "--checkpoint", model, "--images", str(tmp_path), "--max-bad-samples", "1"]
    code, _, err = said(capsys, *words)
    assert code == 1 and "2 images cannot be used" in err and "bad_samples.jsonl" not in err


def test_ranks_share_the_images(model: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "sigmoid" not in (Path(model) / "config.json").read_text().split('"loss"')[1][:12]:
        pytest.skip("once is enough")
    alone = evaluated(capsys, "--checkpoint", model, "--images", str(folder))
    script = ROOT / "vitds" / "cli.py"
    done = ranks(3, script, "evaluate", "--checkpoint", model, "--images", str(folder), "--batch", "1", "--json")
    assert done.returncode == 0, done.stdout
    together = json.loads("{" + done.stdout.partition("{")[2].partition("}")[0] + "}")
    assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert together == alone
    _, one, _ = said(capsys, "predict", "--checkpoint", model, str(folder))
    done = ranks(2, script, "predict", "--checkpoint", model, str(folder), "--batch", "1")
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if line in one.splitlines()] == one.splitlines()


def test_a_verb_that_is_none_is_named_with_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["predct", "x.png"]) == 2
    assert "verb: 'predct' is not known (did you mean 'predict'?)" in capfd.readouterr().err
