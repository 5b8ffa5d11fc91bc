"""`vitds fewshot`, `vitds embed` and `vitds neighbours` on the digits, alone and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.launching import ROOT, ranks
from tests.zero.small import MODEL
from vitds.cli import main
from vitds.data import SourceSection
from vitds.data.digits import Digits
from vitds.evaluation.neighbours import nearest, vote
from vitds.inference.embeddings import open_embeddings
from vitds.models import VitdsImageProcessor, ViTForImageClassification, build_config

CLI = ROOT / "vitds" / "cli.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    ViTForImageClassification(build_config(MODEL)).save_pretrained(place)
    VitdsImageProcessor(8, 8).save_pretrained(place)
    return place


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert main([str(word) for word in words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def embed(model: Path, to: Path, *words: Any) -> None:
    assert main(["embed", "--checkpoint", str(model), "--images", "digits", "--output", str(to), *map(str, words)]) == 0


def plain_features(model: Path, split: str) -> tuple[torch.Tensor, list[int]]:
    """By the saved model and processor alone."""
    digits = Digits(SourceSection("digits", split=split), "eval")
    net, processor = ViTForImageClassification.from_pretrained(model), VitdsImageProcessor.from_pretrained(model)
    pictures = [Image.fromarray(digits.read(i)[0]) for i in range(len(digits))]
    with torch.no_grad():
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        return net.eval()(pixels, features_only=True).logits, digits.labels


def test_fewshot_equals_the_run_files_own_sets(model: Path, tmp_path: Path, capsys) -> None:
    plain = {"source": "digits", "transforms": []}
    run_file = json.loads((ROOT / "ds_configs" / "digits.json").read_text())
    run_file["vitds"]["fewshot"] = {"shots": [1, 5], "seeds": 2, "sets": {"d": {"train": plain, "test": plain}}}
    (tmp_path / "run.json").write_text(json.dumps(run_file))
    by_config = said(capsys, "fewshot", "--checkpoint", model, "--config", tmp_path / "run.json", "--json")
    named = ("--train", "digits:train", "--test", "digits", "--as-evaluated", "--shots", "1,5", "--seeds", 2)
    by_name = said(capsys, "fewshot", "--checkpoint", model, *named, "--batch", 100, "--json")
    assert by_config["sets"]["d"] == by_name["sets"]["digits:train → digits"]
    found = by_name["sets"]["digits:train → digits"]["accuracy"]
    assert found["5"]["mean"] == pytest.approx(np.mean(found["5"]["seeds"]))
    assert main(["fewshot", "--checkpoint", str(model), *map(str, named)]) == 0
    table = capsys.readouterr().out
    assert "10 classes, 360 images to test on" in table
    assert f"{found['5']['mean']:.2%}" in table
    squashed = said(capsys, "fewshot", "--checkpoint", model, *named[:4], *named[5:], "--json")
    assert squashed["sets"]["digits:train → digits"] != by_name["sets"]["digits:train → digits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "digits:train"], "either --train and --test, or --config"),
        (["--train", "digits:train", "--test", "digits", "--shots", "200"], "--train digits:train: 200 shots, but the largest"),
        (["--train", "digits:train", "--test", "digits", "--l2", "0"], "l2: expected a number above 0"),
        (["--train", "digits:trian", "--test", "digits"], "did you mean 'train'"),
        (["--config", str(ROOT / "ds_configs" / "imagenet_s16.json")], "vitds.fewshot.sets names no set"),
    ],
)  # fmt: skip
def test_fewshot_says_what_is_wrong(model: Path, capsys, words: list[str], message: str) -> None:
    assert message in refused(capsys, "fewshot", "--checkpoint", model, *words)


@pytest.mark.launch
def test_two_ranks_print_the_same_table_once(model: Path, capsys) -> None:
    words = ["fewshot", "--checkpoint", str(model), "--train", "digits:train", "--test", "digits", "--json"]
    done = ranks(2, CLI, *words)
    assert done.returncode == 0, done.stdout[-2000:]
    assert json.loads(done.stdout[done.stdout.index("{") :]) == said(capsys, *words)


@pytest.mark.parametrize(("kept", "keys"), [("fp32", "parquet"), ("bf16", "jsonl")])
def test_embeddings_are_the_models_features(model: Path, tmp_path: Path, kept: str, keys: str) -> None:
    embed(model, tmp_path / "e", "--features", kept, "--keys", keys, "--batch", 50)
    features, labels = plain_features(model, "eval")
    stored = load_file(tmp_path / "e" / "features.safetensors")["features"]
    if kept == "bf16":
        assert stored.dtype == torch.bfloat16
    torch.testing.assert_close(stored.float(), features, rtol=4e-3 if kept == "bf16" else 0, atol=1e-5)
    opened = open_embeddings(tmp_path / "e", "DIR")
    found_keys, found_labels = opened.keys_and_labels()
    digits = Digits(SourceSection("digits"), "eval")
    assert found_keys == [digits.key(i) for i in range(360)]
    assert found_labels == labels
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert (manifest["images"], manifest["width"], manifest["layer"]) == (360, 64, "pre_logits")
    assert manifest["source"]["digest"] == digits.digest()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.launch
def test_many_files_of_two_ranks_hold_the_same_rows(model: Path, tmp_path: Path) -> None:
    embed(model, tmp_path / "one")
    words = [
        "embed",
        "--checkpoint",
        model,
        "--images",
        "digits",
        "--output",
        tmp_path / "two",
        "--file-bytes",
        64 * 4 * 77,
    ]
    done = ranks(2, CLI, *map(str, words))
    assert done.returncode == 0, done.stdout[-2000:]
    one, two = (open_embeddings(tmp_path / name, "DIR") for name in ("one", "two"))
    assert [part.rows for part in two.parts] == [77, 77, 26] * 2
    torch.testing.assert_close(torch.cat([*two.blocks(50)]), torch.cat([*one.blocks()]), rtol=0, atol=1e-5)
    assert two.keys_and_labels() == one.keys_and_labels()


def test_unusable_images_have_no_row(model: Path, tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"nothing")
    words = ("embed", "--checkpoint", model, "--images", tmp_path / "images", "--output", tmp_path / "e")
    assert "1 images cannot be used" in refused(capsys, *words, "--max-bad-samples", 0)
    assert not (tmp_path / "e").exists()
    assert not list(tmp_path.glob(".*"))
    assert main([str(word) for word in words]) == 0
    assert "left out: a/1.png" in capsys.readouterr().err
    opened = open_embeddings(tmp_path / "e", "DIR")
    assert opened.keys_and_labels() == (["a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"], [0, 0, 1, 1, 1])
    assert opened.rows == 5
    assert "is there already" in refused(capsys, *words)


@pytest.fixture(scope="module")
def banks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("banks")
    embed(model, place / "eval", "--file-bytes", 64 * 4 * 100)
    words = ["--checkpoint", str(model), "--images", "digits:train", "--output", str(place / "train")]
    assert main(["embed", *words]) == 0
    return place / "train", place / "eval"


def test_neighbours_and_their_votes(model: Path, banks: tuple[Path, Path], capsys) -> None:
    train, held = banks
    found = said(
        capsys, "neighbours", held, "--knn", "1,10", "--neighbours", 4, "--show", "digits/3,digits/0", "--json"
    )
    features, labels = plain_features(model, "eval")
    near = nearest(features, lambda: [features], 10, own=torch.arange(360))
    for k in (1, 10):
        right = vote(near, torch.tensor(labels), k) == torch.tensor(labels)
        assert found["knn_accuracy"][str(k)] == pytest.approx(float(right.double().mean()))
    keys = open_embeddings(held, "DIR").keys_and_labels()[0]
    shown = found["neighbours"][0]
    assert (shown["key"], shown["label"]) == ("digits/3", 3)
    assert [one["key"] for one in shown["nearest"]] == [keys[i] for i in near.rows[keys.index("digits/3"), :4]]
    other = said(
        capsys, "neighbours", train, "--query", held, "--knn", "10", "--metric", "euclidean", "--show", 1, "--json"
    )
    bank, bank_labels = plain_features(model, "train")
    right = vote(nearest(features, lambda: [bank], 10), torch.tensor(bank_labels), 10) == torch.tensor(labels)
    assert other["knn_accuracy"]["10"] == pytest.approx(float(right.double().mean()))
    best = nearest(features[:1], lambda: [bank], 5, "euclidean")
    assert [one["euclidean"] for one in other["neighbours"][0]["nearest"]] == pytest.approx(
        (-best.scores[0]).tolist(), abs=1e-4
    )
    assert main(["neighbours", str(held), "--knn", "1"]) == 0
    assert f"{found['knn_accuracy']['1']:.2%} (leave-one-out)" in capsys.readouterr().out


def test_a_faiss_index_finds_the_same(model: Path, banks: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    faiss = pytest.importorskip("faiss")
    train, held = banks
    for metric in ("cosine", "euclidean"):
        file = tmp_path / f"{metric}.faiss"
        said(capsys, "neighbours", held, "--metric", metric, "--index", file, "--show", 0, "--json")
        queries, bank = (torch.cat([*open_embeddings(path, "DIR").blocks()]) for path in (train, held))
        index = faiss.read_index(str(file))
        asked = torch.nn.functional.normalize(queries) if metric == "cosine" else queries
        scores, rows = index.search(asked.numpy(), 3)
        ours = nearest(queries, lambda bank=bank: [bank], 3, metric)
        assert (rows == ours.rows.numpy()).mean() > 0.999  # but for ties in the last digit
        theirs = scores if metric == "cosine" else -np.sqrt(scores)
        np.testing.assert_allclose(theirs, ours.scores, atol=2e-3)


def test_what_cannot_be_compared_is_refused(model: Path, banks: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    train, held = banks
    other = tmp_path / "other"
    torch.manual_seed(1)
    ViTForImageClassification(build_config(MODEL)).save_pretrained(other)
    VitdsImageProcessor(8, 8).save_pretrained(other)
    embed(other, tmp_path / "e")
    assert "made by checkpoint" in refused(capsys, "neighbours", train, "--query", tmp_path / "e")
    assert "no embeddings there" in refused(capsys, "neighbours", model)
    assert "360 neighbours of each are more than there are" in refused(capsys, "neighbours", held, "--neighbours", 360)
    assert "keys look like 'digits/0'" in refused(capsys, "neighbours", held, "--show", "digits/x")
    whole = tmp_path / "e" / "features.safetensors"
    whole.write_bytes(whole.read_bytes()[:-4])
    assert "bytes long, the manifest says" in refused(capsys, "neighbours", tmp_path / "e")


def test_damaged_embeddings_are_one_line(banks: tuple[Path, Path], model: Path, tmp_path: Path, capsys) -> None:
    _, held = banks
    for kind in ("parquet", "jsonl"):
        embed(model, tmp_path / kind, "--keys", kind)
        keys = tmp_path / kind / f"keys.{kind}"
        keys.write_bytes(keys.read_bytes()[:-9])
        assert "cannot be read" in refused(capsys, "neighbours", tmp_path / kind)
    lines = keys.read_text().splitlines(keepends=True)
    keys.write_text("".join(lines[:-2]))
    assert "358 keys, the manifest says 360" in refused(capsys, "neighbours", tmp_path / "jsonl", "--knn", 3)
    embed(model, tmp_path / "nan")
    whole = tmp_path / "nan" / "features.safetensors"
    content = bytearray(whole.read_bytes())
    place = 256 + 4 * (64 * 17 + 3)
    content[place : place + 4] = np.float32(np.nan).tobytes()
    whole.write_bytes(content)
    for words in (["--knn", 3], ["--show", 1], ["--query", held, "--show", 1]):
        assert "row 17 holds nan or inf" in refused(capsys, "neighbours", tmp_path / "nan", *words)


def test_a_model_that_overflows_has_no_features_and_no_labels(model: Path, tmp_path: Path, capsys) -> None:
    net = ViTForImageClassification.from_pretrained(model)
    with torch.no_grad():
        net.norm.weight[0] = torch.nan
    net.save_pretrained(tmp_path / "net")
    words = ("--checkpoint", tmp_path / "net", "--images", "digits", "--output", tmp_path / "e")
    assert "the features of digits/0 are not finite" in refused(capsys, "embed", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "0.png")
    assert main(["predict", "--checkpoint", str(tmp_path / "net"), "--json", str(tmp_path / "0.png")]) == 1
    assert "scores of it are not finite" in json.loads(capsys.readouterr().out)["error"]


def test_a_disk_that_is_full_is_one_line(model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    words = ("embed", "--checkpoint", model, "--images", "digits", "--output", tmp_path / "e")
    for method in ("__init__", "write", "close"):
        with monkeypatch.context() as patched:
            patched.setattr(f"vitds.inference.embeddings.PartWriter.{method}", full)
            assert "cannot be written: [Errno 28]" in refused(capsys, *words)
        assert not [*tmp_path.iterdir()]
    (tmp_path / "e").symlink_to(tmp_path / "nothing")
    assert "is there already" in refused(capsys, *words)
