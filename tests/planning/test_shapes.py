"""The shape finder finds the paper's two shapes at the edge of the paper's device; its tables and picture say so; it tries shapes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.launching import ROOT, environment
from vitds.cli import main
from vitds.errors import UserError
from vitds.models import Shape, variant_shape
from vitds.planning.devices import device
from vitds.planning.shapefinder import GRADIENTS, OPTIMIZERS, Fit, Found, Limits, at, find, grid, ours, paper
from vitds.planning.shapes_figure import best_by_cell, colour, edges, marked_panel, within

ADAM, HALF, ADAFACTOR = OPTIMIZERS
PAPER = ["--setting", "paper", "--memory", "16", "--device", "a100-40", "--num-classes", "29593"]
G_AND_g = {"ViT-g/14": (1408, 40, 6144), "ViT-G/14": (1664, 48, 8192)}
TINY = [
    "--heads",
    "2",
    "--image-size",
    "8",
    "--patch-size",
    "2",
    "--num-classes",
    "10",
    "--device",
    "cpu",
    "--images",
    "32",
]


def shapes(capsys, *words: str) -> dict:
    assert main(["shapes", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def of_the_paper(capsys, name: str, gradients: str, micro: int) -> dict[str, dict]:
    """What --json says of g or G on a TPUv3 core: its fits."""
    width, depth, mlp = map(str, G_AND_g[name])
    words = ("--widths", width, "--depths", depth, "--mlps", mlp, "--gradients", gradients, "--micro-batch", str(micro))
    (row,) = shapes(capsys, *PAPER, *words)["shapes"]
    assert row["name"] == name
    return row["fits"]


def test_g_is_at_the_edge_of_half_precision_adam(capsys):
    """As the paper has it: 16 GiB hold g with half of Adam's momentum, and not with all of it."""
    fits = of_the_paper(capsys, "ViT-g/14", "fp32", 8)
    assert [fits[name]["micro_batch"] > 0 for name in OPTIMIZERS] == [False, True, True]
    # 16 bytes of 1.078 billion parameters alone: weights, gradients and two moments
    assert fits[ADAM]["bytes"] > 16 * 1_078_117_657


def test_G_needs_modified_adafactor_and_gradients_in_16_bits(capsys):
    """With fp32 gradients 10 bytes of its 1.93 billion parameters are more than 16 GiB; with 16-bit ones the paper's 8 images fit."""
    fits = of_the_paper(capsys, "ViT-G/14", "bf16", 8)
    assert [fits[name]["micro_batch"] for name in OPTIMIZERS] == [0, 0, 8]
    assert 15 < fits[ADAFACTOR]["bytes"] / 2**30 < 16
    assert of_the_paper(capsys, "ViT-G/14", "fp32", 1)[ADAFACTOR]["micro_batch"] == 0


def test_every_optimizer_needs_less_than_the_one_before(capsys):
    words = ("--depths", "4,8", "--widths", "256", "--mlps", "4x,512", "--head-dim", "64", "--device", "h100")
    found = shapes(capsys, *words)
    assert [(row["shape"]["depth"], row["shape"]["mlp_dim"], row["shape"]["num_heads"]) for row in found["shapes"]] == [
        (4, 1024, 4), (8, 1024, 4), (4, 512, 4), (8, 512, 4),
    ]  # fmt: skip
    for row in found["shapes"]:
        needs = [row["fits"][name]["bytes"] for name in OPTIMIZERS]
        assert needs == sorted(needs, reverse=True)
        assert row["first"] == ADAM
        assert row["fits"][ADAM]["micro_batch"] == 128
        assert row["fits"][ADAM]["images_per_second"] > 0


def toy(bytes_per_image: dict[str, int]):
    """Needs that are a table's: so many bytes an image, by policy."""
    from vitds.planning.shapefinder import Need

    return lambda workload: Need(10 + workload.micro_batch * bytes_per_image[workload.policy], 10)


@pytest.fixture(scope="module")
def workload():
    from vitds.models import ViTConfig
    from vitds.planning.workload import workload_of_shape

    model = ViTConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=2, image_size=8)
    return workload_of_shape(model, {"type": "ModifiedAdafactor", "params": {}}, {}, micro_batch=1)


@pytest.mark.parametrize(
    ("memory", "micro", "policy"),
    [(10 + 7 * 3, 0, "full"), (10 + 8 * 3, 8, "full"), (10 + 8 * 5, 8, "selective"), (10 + 8 * 9 - 1, 8, "selective"),
     (10 + 8 * 9, 8, "none"), (10 + 40 * 9 - 1, 32, "none"), (10 + 40 * 9, 40, "none"), (10**6, 64, "none")],
)  # fmt: skip
def test_the_largest_micro_batch_with_the_least_recomputation(workload, memory, micro, policy):
    limits = Limits(memory, least=8, most=64, images=64)
    found = find("64", workload, device("h100"), limits, toy({"none": 9, "selective": 5, "full": 3}))
    fit = found.fits[ADAFACTOR]
    assert (fit.micro_batch, fit.policy) == (micro, policy)
    assert fit.bytes == 10 + (micro or 8) * {"none": 9, "selective": 5, "full": 3}[policy]
    assert at(workload, 24, limits).accumulation == 3


def test_the_setting_of_the_paper_counts_its_bytes(workload):
    """Between one gradient precision and another lie whole bytes a parameter, between optimizers those of their states."""
    trained = workload.job.trained
    need = {name: paper(size)(workload).total for name, size in GRADIENTS.items()}
    assert (need["fp32"] - need["bf16"], need["bf16"] - need["none"]) == (2 * trained, 2 * trained)
    adam, half = (paper(4)(workload.with_optimizer(*OPTIMIZERS[name][:1])).total for name in (ADAM, HALF))
    assert adam - half == 2 * trained
    assert ours(workload).total > ours(workload).peak > 0


def test_heads_that_divide_no_width():
    assert [shape.num_heads for _, shape in grid([1], [96], ["4x"], [16], [32, 48, 64], 14)] == [3, 2]
    assert [shape.width for _, shape in grid([1], [96, 100], ["4x"], [5], [], 14)] == [100]
    with pytest.raises(UserError, match="--head-dim 64: divides none of --widths 96"):
        list(grid([1], [96], ["4x"], [16], [64], 14))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "h20"], "did you mean 'h200'"),
        (["--setting", "paper", "--measure"], "--measure and --set are for the setting ours"),
        (["--micro-batch", "9", "--most", "8"], "--most: 8 is less than --micro-batch 9"),
        (["--heads", "3", "--widths", "32"], "--heads 3: divides none of --widths 32"),
        (["--set", "vitds.train.compil=true", "--widths", "1024", "--depths", "1"], "did you mean 'compile'"),
        (["--mlps", "4y"], "expected a whole number"),
        (["--widht", "1"], "did you mean '--widths'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes(capsys, words, said):
    with contextlib.suppress(SystemExit):  # the parser's own
        assert main(["shapes", *words]) == 2
    assert said in capsys.readouterr().err


def row(width: int, depth: int, mlp: int, *micros: int) -> Found:
    fits = {
        name: Fit(name, micro, "none", 0, 0, 100.0 * (micro > 0))
        for name, micro in zip(OPTIMIZERS, micros, strict=True)
    }
    return Found(Shape(width, depth, mlp, 16, 14), "", str(mlp), 0, 0, fits)


def test_the_picture_shows_what_the_table_says():
    orange, green, blue, white = (
        row(1408, 40, 6144, 8, 8, 8),
        row(1408, 48, 6144, 0, 8, 8),
        row(1664, 48, 6144, 0, 0, 8),
        row(1664, 56, 8192, 0, 0, 0),
    )
    rows = [orange, green, blue, white]
    shades = [colour(one, 100.0) for one in rows]
    assert len(set(shades)) == 4
    assert shades[3] == (1, 1, 1)
    assert max(shades[0]) == shades[0][0] and max(shades[1]) == shades[1][1] and max(shades[2]) == shades[2][2]
    assert sum(colour(orange, 400.0)) < sum(shades[0])  # slower is darker
    assert best_by_cell([blue, row(1664, 48, 6144, 0, 8, 8)])[1664, 48].first == HALF
    assert marked_panel(rows, variant_shape("ViT-G/14")) == "8192"
    assert marked_panel(rows, variant_shape("ViT-g/14")) == "6144"
    assert edges([1, 3, 7]) == [0, 2, 5, 9]
    assert edges([5]) == [4.5, 5.5]
    assert within(variant_shape("ViT-G/14"), [1408, 1664], [40, 48])
    assert not within(variant_shape("ViT-G/14"), [1024, 1280], [40, 48])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib (vitds[plots])")
def test_the_picture_is_one(tmp_path, capsys):
    file = tmp_path / "shapes.png"
    words = ["shapes", *TINY, "--depths", "1,2", "--widths", "32,64", "--mlps", "2x,4x", "--figure", str(file)]
    assert main(words) == 0
    assert Image.open(file).size[0] > 500
    assert main([*words[:-1], str(tmp_path / "none" / "shapes.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_figure_without_matplotlib_says_what_to_install(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    told = environment()
    told["PYTHONPATH"] = f"{tmp_path}:{told['PYTHONPATH']}"
    words = [sys.executable, "-m", "vitds.cli", "shapes", "--figure", "shapes.png"]
    done = subprocess.run(words, env=told, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "pip install 'vitds[plots]'" in done.stderr


@pytest.mark.launch
def test_shapes_are_tried_also_past_one_that_memory_does_not_hold(tmp_path):
    """The second shape's weights are 4 GB, which the forecast grants and this process's limit does not."""
    words = [
        "shapes",
        *TINY,
        "--widths",
        "1024",
        "--depths",
        "1",
        "--mlps",
        "1000000,64",
        "--most",
        "8",
        "--measure",
        "2",
        "--json",
    ]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30))"
    call = f"{limit}; import sys; from vitds.cli import main; sys.exit(main({[*words, '--memory', '64']!r}))"
    done = subprocess.run(
        [sys.executable, "-c", call], env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    large, small = (one["measured"] for one in json.loads(done.stdout)["shapes"])
    assert large["failed"].startswith("out of memory"), large
    assert small["failed"] == ""
    assert small["images_per_second"] > 0
    assert 0 < small["peak_bytes"] < 2**30
    assert small["optimizer"] == ADAFACTOR


def test_nothing_of_the_figure_is_imported_without_it():
    probe = "import sys; import vitds.planning.shapes_verb; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], env=environment(), cwd=Path(ROOT), timeout=300).returncode == 0
