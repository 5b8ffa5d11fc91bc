"""`vitds data bench`: its arithmetic on numbers made up, its measuring on a small run."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from vitds.cli import main
from vitds.data_verbs.bench import peak_of, verdict
from vitds.errors import UserError

STAGES = {"read": 0.1e-3, "decode": 1.2e-3, "crop and resize": 0.5e-3, "other transforms": 0.05e-3, "collate": 0.05e-3}


@pytest.fixture
def run_file(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (150, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / ("ant" if i % 2 else "bee") / f"{i}.jpg")
    (tmp_path / "images" / "ant" / "broken.jpg").write_bytes(b"no image")
    path = tmp_path / "run.json"
    images = {"source": "folder", "path": str(tmp_path / "images")}
    model = {"variant": "ViT-Ti/16", "num_classes": 2, "image_size": 32}
    vitds = {"model": model, "data": {"train": images}, "train": {"total_steps": 9}}
    path.write_text(json.dumps({"train_batch_size": 8, "bf16": {"enabled": True}, "vitds": vitds}))
    return path


def test_a_small_run_is_measured(run_file, capsys):
    arguments = ["data", "bench", "--config", str(run_file), "--images", "24", "--workers", "0,1"]
    assert main([*arguments, "--device", "A100", "--mfu", "0.4", "--gpus-per-host", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["microseconds_per_image"]) == list(STAGES), "no transfer without a GPU"
    assert min(found["microseconds_per_image"].values()) > 0
    assert set(found["images_per_second_by_workers"]) == {"0", "1"}
    assert found["device"] == "312 TFLOP/s, A100 bf16 dense"
    assert found["images_per_second_per_host"] == 2 * found["images_per_second_per_gpu"] > 0
    assert main([*arguments, "--peak-tflops", "0.001", "--gpus-per-host", "1"]) == 0
    printed = capsys.readouterr().out
    assert "device will be the bottleneck" in printed
    assert "1 workers: " in printed


def test_a_device_that_needs_less_than_there_is_is_the_bottleneck():
    # 2 workers make 800 images/s, so a core makes 400; 4 GPUs of 350 take 1400: 4 cores beside the ranks' own 4, one worker for each rank.
    found = verdict({0: 300.0, 2: 800.0}, STAGES, needed=350, gpus=4, cores=8, num_workers=0)
    assert found["bottleneck"] == "device"
    assert (found["images_per_second_per_core"], found["cores_needed"], found["advice"]) == (400, 4, [])
    assert verdict({2: 800.0}, STAGES, needed=350, gpus=4, cores=7, num_workers=0)["bottleneck"] == "loader"
    found = verdict({2: 800.0}, STAGES, needed=450, gpus=4, cores=9, num_workers=1)
    assert (found["cores_needed"], found["advice"]) == (5, ["vitds.data.num_workers of 2 (it is 1)"])


def test_a_loader_that_is_too_slow_hears_what_would_help():
    found = verdict({1: 400.0, 16: 500.0}, STAGES, needed=1000, gpus=8, cores=16, num_workers=0)
    assert (found["bottleneck"], found["cores_needed"]) == ("loader", 20)
    assert (
        "8 GPUs take 8000 images/s, which needs 20 cores; this host has 16, of which the ranks leave 8, for 3200 images/s"
        in found["verdict"]
    )
    assert [
        word for word in ("num_workers", "storage", "smaller files", "cores") if word in "; ".join(found["advice"])
    ] == [
        "smaller files",
        "cores",
    ]
    slow = verdict({1: 400.0}, STAGES | {"read": 5e-3}, needed=1000, gpus=8, cores=8, num_workers=4)
    assert "storage" in slow["advice"][0]


def test_the_peak_is_what_is_given_or_known():
    def run(**deepspeed):
        train = types.SimpleNamespace(tf32=True, peak_tflops=50.0)
        return types.SimpleNamespace(deepspeed=deepspeed, vitds=types.SimpleNamespace(train=train))

    half = run(bf16={"enabled": True})
    assert peak_of(half, None, 70.0).flops == 70e12
    assert peak_of(half, None, None).flops == 50e12, "the run file's"
    assert peak_of(half, "H100", None).flops == 989e12
    assert peak_of(run(), "H100", None).flops == 989e12 / 2, "tf32"
    assert peak_of(half, "H100", 70.0).flops == 70e12
    assert peak_of(half, "h100 pcie", None).flops == 756e12
    with pytest.raises(
        UserError, match=r"--device: 'H1000' is not known \(did you mean 'H100'\?\); allowed: H200 NVL, "
    ):
        peak_of(half, "H1000", None)
    full = types.SimpleNamespace(deepspeed={}, vitds=types.SimpleNamespace(train=types.SimpleNamespace(tf32=False)))
    with pytest.raises(UserError, match=r"the peak of 'H100' in fp32 is not known; give it by --peak-tflops"):
        peak_of(full, "H100", None)


@pytest.mark.parametrize(
    ("argument", "value"), [("--workers", "1,x"), ("--mfu", "0"), ("--mfu", "50"), ("--images", "0")]
)
def test_arguments_that_make_no_sense_are_refused(run_file, argument, value):
    with pytest.raises(SystemExit):
        main(["data", "bench", "--config", str(run_file), argument, value])
