"""The few-shot sets of a run file, and the probe inside training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.digit_files import write_folders
from tests.evaluation import reference
from tests.evaluation.probed import DIGITS, Plain
from tests.launching import ROOT, train_alone
from vitds.config import load_run_file, prepare
from vitds.data import DataSection, SourceSection, build_source
from vitds.data.sources import SOURCES
from vitds.errors import UserError
from vitds.evaluation.fewshot import FewShot
from vitds.evaluation.probe_sets import FewshotSection, open_sets
from vitds.metrics import read_metrics
from vitds.models import ViTForImageClassification
from vitds.sections import parse, to_json

RUN_FILE = ROOT / "ds_configs" / "digits.json"
PLAIN = {"source": "digits", "transforms": []}


def opened(given: dict[str, Any], image_size: int = 8) -> list[Any]:
    return open_sets(parse(FewshotSection, given, "vitds.fewshot"), image_size)


def folder_of(root: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """A folder of so many noise images per class."""
    for name, size in sizes.items():
        (root / name).mkdir(parents=True)
        for i in range(size):
            pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return {"source": "folder", "path": str(root)}


def measured(given: dict[str, Any], engine: Plain, batch: int = 50) -> dict[str, float]:
    section = parse(FewshotSection, given, "vitds.fewshot")
    data = DataSection(SourceSection("digits"))
    shared = {"batch": batch, "image_size": 8, "rank": 0, "world_size": 1}
    return FewShot(engine, open_sets(section, 8), section.shots, section.l2, data, **shared).measure(lambda: None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shots": []}, "vitds.fewshot.shots: expected different whole numbers ≥ 1, found []"),
        ({"shots": [5, 5]}, "different whole numbers"),
        ({"shots": [0]}, "different whole numbers"),
        ({"l2": 0}, "vitds.fewshot.l2: expected a number above 0, found 0"),
        ({"seeds": 0}, "vitds.fewshot.seeds: expected at least 1"),
        ({"sets": {"a b": {"train": PLAIN, "test": PLAIN}}}, "'a b' is part of metrics' names"),
        ({"sets": {"digits": {"train": PLAIN}}}, "vitds.fewshot.sets.digits.test: missing"),
        ({"sets": {"digits": {"trian": PLAIN, "test": PLAIN}}}, "did you mean 'train'"),
        ({"shots": [200], "sets": {"digits": {"train": PLAIN, "test": PLAIN}}},
         "vitds.fewshot.sets.digits.train: 200 shots, but the largest of its 10 classes has 147 images"),
        ({"sets": {"x": {"train": PLAIN, "test": {"source": "folder", "path": "/nowhere"}}}},
         "vitds.fewshot.sets.x.test.path: '/nowhere' is not there"),
        ({"sets": {"x": {"train": PLAIN, "test": {"source": "digits", "transforms": [{"resize": {"size": 9}}]}}}},
         "vitds.fewshot.sets.x.test.transforms: digits/0 comes out 9×9, the model takes 8×8"),
        ({"sets": {"x": {"train": PLAIN, "test": {"source": "synthetic"}}}}, "number their classes differently: 10 and 1000"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_training(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = json.loads(RUN_FILE.read_text())
    given["vitds"]["fewshot"] = wrong
    path = tmp_path / "run.json"
    path.write_text(json.dumps(given))
    with pytest.raises(UserError) as refused:
        prepare(load_run_file(str(path)))
    assert said in str(refused.value)


def test_several_labels_an_image_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Several(SOURCES["digits"]):  # type: ignore[name-defined,misc]
        multi_label = True

    monkeypatch.setitem(SOURCES, "digits", Several)
    with pytest.raises(UserError, match=r"sets\.d\.train: its images have several labels"):
        opened({"sets": {"d": {"train": PLAIN, "test": PLAIN}}})


def test_a_small_class_gives_all_it_has_and_is_named(tmp_path: Path) -> None:
    train = folder_of(tmp_path / "train", {"cat": 40, "dog": 3, "eel": 6})
    test = folder_of(tmp_path / "test", {"cat": 2, "dog": 1, "eel": 1})
    (one,) = opened({"sets": {"pets": {"train": train, "test": test}}, "shots": [1, 5]})
    assert (
        one.remark
        == "vitds.fewshot.sets.pets.train: 1 classes have fewer than 5 images and give all they have: 'dog' has 3"
    )
    assert one.num_classes == 3
    for places in one.places:
        kept = one.train.all_labels()[places >= 0]
        assert np.bincount(kept).tolist() == [5, 3, 5]
    assert len(one.train) == (one.places >= 0).any(axis=0).sum() <= 24  # nothing else is read


def test_sections_survive_json() -> None:
    section = FewshotSection(sets={"digits": DIGITS})
    assert parse(FewshotSection, json.loads(json.dumps(to_json(section))), "vitds.fewshot") == section


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_all_labels_are_those_of_the_images(name: str, tmp_path: Path) -> None:
    write_folders(tmp_path)
    path = str(tmp_path / "eval") if name == "folder" else None
    source = build_source(SourceSection(name, path=path), "eval")
    assert source.all_labels().tolist() == [source.label(i) for i in range(len(source))]


def test_equals_numpy_on_the_features_of_all_images() -> None:
    engine = Plain()
    found = measured({"sets": {"d": {"train": PLAIN, "test": PLAIN}}, "shots": [1, 10], "seeds": 2}, engine)
    sets = [build_source(SourceSection("digits"), role) for role in ("train", "eval")]
    features, labels = [], []
    for source in sets:
        pixels = torch.tensor(np.stack([source.read(i)[0] for i in range(len(source))]))
        with torch.no_grad():
            images = pixels[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
            features.append(engine.model(images, features_only=True).logits.numpy())
        labels.append(np.array(source.labels))
    for shots in (1, 10):
        right = []
        for seed in (0, 1):
            chosen = reference.drawn(labels[0], shots, seed)
            solution = reference.ridge(features[0][chosen], labels[0][chosen], 10, 1024.0)
            right.append((reference.predictions(solution, features[1]) == labels[1]).mean())
            assert found[f"fewshot/d_{shots}shot_seed{seed}"] == right[-1]
        assert found[f"fewshot/d_{shots}shot"] == pytest.approx(np.mean(right))


def test_images_are_squashed_and_cropped_unless_told_otherwise(tmp_path: Path) -> None:
    train, test = (folder_of(tmp_path / role, {"a": 2, "b": 2}) for role in ("train", "test"))
    (one,) = opened({"sets": {"x": {"train": train, "test": {**test, "transforms": ["resize"]}}}, "shots": [1]}, 224)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    rng, found = np.random.default_rng(0), []
    for transforms in one.transforms:
        picture: Any = pixels
        for transform in transforms:
            picture = transform(picture, rng)
        found.append(np.asarray(picture))
    squashed = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BILINEAR))
    assert np.array_equal(found[0], squashed[16:240, 16:240])
    assert np.array_equal(found[1], np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR)))


def test_only_images_that_are_drawn_are_run(tmp_path: Path) -> None:
    engine = Plain()
    measured({"sets": {"d": {"train": PLAIN, "test": PLAIN}}, "shots": [2], "seeds": 1}, engine, batch=20)
    assert engine.images == 20 + 360


def test_bad_images_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (folder_of(tmp_path / role, {"a": 4, "b": 4}) for role in ("train", "test"))
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"no image")
    given = {"sets": {"x": {"train": train, "test": test}}, "shots": [4], "seeds": 1}
    found = measured(given, Plain())
    assert found["fewshot/x_4shot"] * 7 == pytest.approx(round(found["fewshot/x_4shot"] * 7))
    assert "vitds.fewshot.sets.x.test: 1 images cannot be used: a/1.png" in capsys.readouterr().err


def test_features_that_are_not_finite_are_said_and_not_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Plain()
    with torch.no_grad():
        engine.model.norm.bias.fill_(float("nan"))
    found = measured({"sets": {"d": {"train": PLAIN, "test": PLAIN}}, "shots": [1], "seeds": 1}, engine)
    assert np.isnan(list(found.values())).all()
    assert "vitds.fewshot.sets.d.test: the features of 360 images are not finite" in capsys.readouterr().err


def test_which_of_the_images_have_features_that_are_not_finite_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blinded(SOURCES["digits"]):  # type: ignore[name-defined,misc]
        """Training images are white."""

        def read(self, index: int) -> Any:
            pixels, label, name = super().read(index)
            return (np.full_like(pixels, 255), label, name) if len(self) > 360 else (pixels, label, name)

    class Overflowing(Plain):
        def __call__(self, images: torch.Tensor, features_only: bool) -> Any:
            found = super().__call__(images, features_only)
            found.logits[images.flatten(1).amin(dim=1) == 1] = float("inf")
            return found

    monkeypatch.setitem(SOURCES, "digits", Blinded)
    found = measured({"sets": {"d": {"train": PLAIN, "test": PLAIN}}, "shots": [1], "seeds": 1}, Overflowing())
    assert np.isnan(list(found.values())).all()
    assert "vitds: vitds.fewshot.sets.d.train: the features of 10 images are not finite" in capsys.readouterr().err


def test_an_l2_too_small_for_the_features_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Plain()
    with torch.no_grad():
        engine.model.norm.weight.zero_()  # every image looks the same, to rounding
    found = measured({"sets": {"d": {"train": PLAIN, "test": PLAIN}}, "shots": [2], "seeds": 1, "l2": 1e-300}, engine)
    assert np.isnan(list(found.values())).all()
    assert (
        "vitds: vitds.fewshot.sets.d.train: with l2 = 1e-300 the equations have no solution" in capsys.readouterr().err
    )


SMALL = [
    "vitds.train.total_steps=6", "vitds.train.log_every_steps=1", "vitds.train.eval_every_steps=6", "vitds.model.depth=1",
    "train_batch_size=24", "zero_optimization.stage=3", "bf16.enabled=false", "vitds.ema.decay=0.5", "vitds.data.minival=0.05",
    'scheduler.params={"warmup_steps":2,"timescale_steps":4,"cooldown_steps":2}', "vitds.checkpoint.every_steps=3",
]  # fmt: skip
PROBED = [
    "vitds.fewshot.every_steps=3", "vitds.fewshot.shots=[1,5,25]", "vitds.fewshot.seeds=2",
    'vitds.fewshot.sets={"digits":{"train":{"source":"digits","transforms":[]},"test":{"source":"digits","transforms":[]}}}',
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """ZeRO-3 on 2 ranks with the probe, and without it."""
    runs = [tmp_path_factory.mktemp("probed") / name for name in ("with", "without")]
    for run, overrides in zip(runs, ([*SMALL, *PROBED], [*SMALL, "vitds.fewshot.sets={}"]), strict=True):
        done = train_alone(2, RUN_FILE, run, *overrides)
        assert done.returncode == 0, done.stdout[-3000:]
    return runs[0], runs[1]


@pytest.mark.launch
def test_training_measures_what_the_saved_weights_are_worth(trained: tuple[Path, Path]) -> None:
    rows = {row["step"]: row for row in read_metrics(trained[0])}
    names = {f"fewshot/digits_{k}shot{seed}" for k in (1, 5, 25) for seed in ("", "_seed0", "_seed1")}
    names |= {name.replace("fewshot/", "fewshot_ema/") for name in names}
    for step in (3, 6):
        assert names <= set(rows[step])
        assert rows[step]["perf/fewshot_seconds"] > 0
        for variant, prefix in ((None, "fewshot"), ("ema", "fewshot_ema")):
            place = trained[0] / "checkpoints" / f"step-{step:09}"
            engine = Plain()
            engine.model = ViTForImageClassification.from_pretrained(place, variant=variant).eval()
            given = {"sets": {"digits": {"train": PLAIN, "test": PLAIN}}, "shots": [1, 5, 25], "seeds": 2}
            for name, value in measured(given, engine).items():
                assert rows[step][name.replace("fewshot", prefix)] == pytest.approx(value, abs=1.5 / 360), name
    curves = EventAccumulator(str(trained[0] / "tensorboard")).Reload()
    for name in names:
        points = [(point.step, point.value) for point in curves.Scalars(name)]
        assert points == [(step, pytest.approx(rows[step][name])) for step in (3, 6)], name
    assert "eval/top1" not in rows[3]
    assert {"eval/top1", "minival/top1", "minival_ema/top1", "data/bad_samples_minival"} <= set(rows[6])
    state = json.loads((trained[0] / "checkpoints" / "step-000000006" / "training_state.json").read_text())
    assert state["evaluation"]["fewshot/digits_5shot"] == rows[6]["fewshot/digits_5shot"]
    assert not [name for name in state["evaluation"] if name.startswith("perf/")]


@pytest.mark.launch
def test_the_probe_changes_no_bit_of_the_run(trained: tuple[Path, Path]) -> None:
    hashes = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (run / "checkpoints" / "step-000000006").glob("*.safetensors")
        }
        for run in trained
    ]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) >= 3  # weights, their average, the optimizer's state
    losses = [[row.get("train/loss") for row in read_metrics(run)] for run in trained]
    assert losses[0] == losses[1]
