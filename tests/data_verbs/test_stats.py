"""Statistics against images of which everything is known."""

import io
import json
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vitds.cli import main
from vitds.data_verbs.tally import quantiles


@pytest.fixture
def folder(tmp_path):
    """Two classes of five and two images; one truncated, one of no format, one too large to decode."""
    root = tmp_path / "images"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(root / "ant" / "turned.jpg", exif=exif)
    Image.fromarray(noise).convert("CMYK").save(root / "ant" / "cmyk.jpg")
    Image.fromarray(noise[:7, :9]).convert("RGBA").save(root / "ant" / "alpha.png")
    Image.fromarray(noise[:, :, 0]).save(root / "ant" / "grey.webp", lossless=True)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, "JPEG")
    (root / "ant" / "short.jpg").write_bytes(encoded.getvalue()[:-200])
    (root / "bee" / "text.png").write_bytes(b"no image at all")
    Image.fromarray(np.zeros((2, 500), np.uint8)).save(root / "bee" / "wide.png")
    return root


@pytest.mark.parametrize("workers", ["1", "2"])
def test_headers_tell_sizes_and_formats(folder, workers, capsys):
    assert main(["data", "stats", "--path", str(folder), "--json", "--workers", workers]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 7
    assert found["bytes"] == sum(path.stat().st_size for path in folder.rglob("*.*"))
    assert found["classes"] == [{"label": 0, "name": "ant", "images": 5}, {"label": 1, "name": "bee", "images": 2}]
    assert found["formats"] == {"JPEG": 3, "PNG": 2, "WEBP": 1}
    assert found["kinds"] == {"EXIF-rotated": 1, "CMYK": 1, "alpha": 1, "grey": 1}
    assert found["width"] == {"least": 9, "25 %": 30, "50 %": 30, "75 %": 40, "95 %": 500, "most": 500}
    assert found["smallest"] == {"pixels": 63, "width": 9, "height": 7, "key": "ant/alpha.png"}
    assert (found["largest"]["width"], found["largest"]["height"]) == (40, 30)
    assert [one["key"] for one in found["broken"]] == ["bee/text.png"]
    assert "cannot identify" in found["broken"][0]["reason"]


def test_sixteen_bits_are_found_in_colours_too(tmp_path, capsys):
    (tmp_path / "ant").mkdir()
    Image.fromarray(np.zeros((4, 160, 3), np.uint8)).save(tmp_path / "ant" / "8.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "ant" / "grey.png")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)  # 3×2 pixels, 16 bits, red green blue
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(2 * (1 + 3 * 6)))), chunk(b"IEND", b"")]
    (tmp_path / "ant" / "colours.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert main(["data", "stats", "--path", str(tmp_path), "--json", "--decode"]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == {"16-bit": 2}


def test_decoding_finds_what_headers_do_not_tell(folder, capsys):
    assert main(["data", "stats", "--path", str(folder), "--decode", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "2 broken\n" in out
    assert "ant/short.jpg: OSError" in out
    for name in ("ant/short.jpg", "bee/text.png"):
        (folder / name).unlink()
    assert main(["data", "stats", "--path", str(folder), "--decode", "--workers", "1"]) == 0
    assert "2 classes, 1 to 4 images each, 0 without any" in capsys.readouterr().out


def test_labels_that_the_model_does_not_have_are_broken(folder, tmp_path, capsys):
    run_file = tmp_path / "run.json"
    model = {"variant": "ViT-mu/16", "num_classes": 1}
    data = {"train": {"source": "folder", "path": str(folder)}}
    run_file.write_text(json.dumps({"train_batch_size": 4096, "vitds": {"model": model, "data": data}}))
    assert main(["data", "stats", "--config", str(run_file), "--json", "--workers", "1"]) == 1
    reasons = {one["key"]: one["reason"] for one in json.loads(capsys.readouterr().out)["broken"]}
    assert reasons == dict.fromkeys(("bee/text.png", "bee/wide.png"), "label 1 is not one of the model's 1 classes")
    assert main(["data", "stats", "--config", str(run_file), "--role", "eval"]) == 2
    assert "vitds.data.eval: missing" in capsys.readouterr().err


def test_arrays_and_many_classes(tmp_path, capsys):
    run_file = tmp_path / "run.json"
    data = {"train": {"source": "synthetic", "num_images": 150, "num_classes": 100, "image_size": 8}}
    run_file.write_text(json.dumps({"train_batch_size": 8, "vitds": {"data": data}}))
    assert main(["data", "stats", "--config", str(run_file), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "150 images" in out
    assert "100 classes, 1 to 2 images each" in out
    assert out.count("█") > 40
    assert main(["data", "stats"]) == 2
    assert "either --config or --path" in capsys.readouterr().err


def test_quantiles_are_those_of_the_values():
    values = np.random.default_rng(0).integers(1, 50, 1000)
    found = quantiles(Counter(values.tolist()))
    for name, part in (("least", 0.0), ("25 %", 0.25), ("50 %", 0.5), ("95 %", 0.95), ("most", 1.0)):
        assert found[name] == np.quantile(values, part, method="inverted_cdf"), name
