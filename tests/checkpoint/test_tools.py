"""`vitds checkpoint ls | verify | diff`, as a person runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import EXTRA, SMALL_FILES, TRAINING_STATE, logical, shards, small_checkpoint
from corruption import averaged_checkpoint, snapshot
from test_damage import edit, reseal

from vitds.checkpoint import Saver, compare
from vitds.checkpoint.format import MODEL, OPTIMIZER
from vitds.cli import main
from vitds.json_files import write_json


@pytest.fixture
def vitds(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> tuple[int, list[str], str]:
        code = main(["checkpoint", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return run


def row_of(lines: list[str], step: int) -> str:
    return next(line for line in lines if line.split()[:1] == [str(step)])


def saved(directory: Path, change: Any = None, step: int = 12, **state: Any) -> Path:
    """A checkpoint whose tensors `change(weights, state)` has changed in place before."""
    weights, optimizer = logical()
    if change is not None:
        change(weights, optimizer)
    saver = Saver(directory, **SMALL_FILES)
    tensors = {MODEL: shards(weights, 0, 1), OPTIMIZER: shards(optimizer, 0, 1)}
    saver.begin(step, tensors, {**TRAINING_STATE, "step": step, **state}, EXTRA)
    return saver.commit().path


def test_ls_tells_what_is_there_and_what_a_resume_takes(tmp_path: Path, vitds: Any) -> None:
    home = tmp_path / "run" / "checkpoints"
    small_checkpoint(home, 12)
    averaged_checkpoint(home, 24)
    saved(home, step=36, position=500, evaluation={"eval/top1": 0.25, "eval_ema/top1": 0.5})
    os.truncate(small_checkpoint(home, 48) / "config.json", 3)
    for name in ("step-000000060.tmp", "step-000000012.replaced.tmp", "step-000000006.deleted.tmp", "mine"):
        (home / name).mkdir()
    before = snapshot(tmp_path)
    code, lines, _ = vitds("ls", tmp_path / "run")
    assert code == 0
    assert snapshot(tmp_path) == before
    assert lines[0] == f"{home}:"
    assert [line.split()[0] for line in lines[2:6]] == ["12", "24", "36", "48"]
    assert "ModifiedAdafactor  ZeRO-2 on 3  0.2500" in " ".join(row_of(lines, 12).split(" "))
    assert " no " in row_of(lines, 12)
    assert " yes " in row_of(lines, 24)
    assert "0.2500 / 0.5000" in row_of(lines, 36)
    assert row_of(lines, 48).endswith("not used: config.json: 3 bytes long, the manifest says 21")
    assert [line for line in lines if "a resume goes on from here" in line] == [row_of(lines, 36)]
    assert [line.split(":")[0].strip() for line in lines[6:]] == [
        "step-000000006.deleted.tmp",
        "step-000000012.replaced.tmp",
        "step-000000060.tmp",
    ]
    write_json(tmp_path / "run" / "skips.json", {"skips": [{"start": 480, "end": 496}]})
    _, lines, _ = vitds("ls", home)
    assert "not used: it learnt from positions 480 to 496" in row_of(lines, 36)
    assert not any("a resume goes on" in line for line in lines), "2**40 positions have all learnt from it"
    write_json(tmp_path / "run" / "skips.json", {"skips": [{"start": 2**41, "end": 2**42}]})
    assert "a resume goes on from here" in row_of(vitds("ls", home)[1], 36)


def test_ls_of_many_runs_and_of_none(tmp_path: Path, vitds: Any) -> None:
    small_checkpoint(tmp_path / "a" / "checkpoints", 12)
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    assert vitds("ls", tmp_path)[1][-1] == f"{tmp_path}/b/checkpoints: no checkpoints"
    assert row_of(vitds("ls", tmp_path)[1], 12)
    edit(tmp_path / "a" / "checkpoints" / "step-000000012" / "manifest.json", lambda m: m.update(format_version=2))
    assert "is newer than this vitds reads" in row_of(vitds("ls", tmp_path)[1], 12)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["ls", "none"], "no such directory"),
        (["ls", "file"], "not a directory"),
        (["ls", "empty"], "no checkpoints: expected a run"),
        (["verify", "none"], "no such directory"),
        (["verify", "run"], "no checkpoints"),
        (["diff", "run", "run"], "holds no whole checkpoint"),
        (["diff", "good", "none"], "no such directory"),
        (["diff", "good", "damaged/step-000000012"], "optimizer.safetensors.index.json: missing"),
        (["ls", "good/checkpoints/step-000000012"], "is one checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vitds: Any, words: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    small_checkpoint(tmp_path / "good" / "checkpoints")
    (small_checkpoint(tmp_path / "damaged") / "optimizer.safetensors.index.json").unlink()
    code, lines, said = vitds(*words)
    assert (code, lines) == (2, [])
    assert said.startswith("vitds: ")
    assert reason in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["diff", "a"], ["diff", "a", "b", "--tolerance", "-1"], ["mend", "a"]])
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["checkpoint", *words])
    assert left.value.code == 2


def test_verify_reads_every_byte_and_gives_each_a_verdict(tmp_path: Path, vitds: Any) -> None:
    home = tmp_path / "checkpoints"
    for step in (12, 24, 36):
        averaged_checkpoint(home, step)
    code, lines, _ = vitds("verify", tmp_path)
    assert code == 0
    assert [line.split(",")[0] for line in lines] == [f"step-0000000{s}: good: 12 files" for s in (12, 24, 36)]
    assert lines[0].endswith(" 26 tensors (model, optimizer, model.ema)")
    for name in ("model.ema-00002-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"):
        data = bytearray((home / "step-000000024" / name).read_bytes())
        data[-1] ^= 4
        (home / "step-000000024" / name).write_bytes(data)
    code, lines, _ = vitds("verify", home)
    assert code == 1
    assert [": good: " in line for line in lines] == [True, False, True]
    assert lines[1].startswith("step-000000024: BAD: model.ema-00002-of-00002.safetensors: its content is not what was")
    assert "; optimizer-00001-of-00002.safetensors: its content" in lines[1]
    assert vitds("verify", home / "step-000000024")[0] == 1
    assert vitds("verify", home / "step-000000036")[0] == 0
    (home / "step-000000036" / "manifest.json").unlink()
    assert vitds("verify", home / "step-000000036")[1] == ["step-000000036: BAD: manifest.json: missing"]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "optimizer.safetensors.index.json",
            lambda index: index["weight_map"].pop("blocks.2.w.mask"),
            "optimizer-00001-of-00002.safetensors: no index names its tensor 'blocks.2.w.mask'",
        ),
        (
            "model.safetensors.index.json",
            lambda index: index["metadata"].update(total_size=1),
            "model.safetensors.index.json: metadata.total_size: 1, its tensors have ",
        ),
        ("training_state.json", lambda state: state.pop("position"), "training_state.json: position: missing"),
    ],
)
def test_verify_finds_what_was_saved_incomplete(tmp_path: Path, vitds: Any, file: str, change: Any, words: str) -> None:
    """The sums are right: it was so when it was written."""
    path = small_checkpoint(tmp_path)
    if file == "optimizer.safetensors.index.json":
        where = json.loads((path / file).read_text())["weight_map"]["blocks.2.w.mask"]
        words = words.replace("optimizer-00001-of-00002.safetensors", where)
    edit(path / file, change)
    reseal(path)
    code, lines, _ = vitds("verify", path)
    assert code == 1
    assert lines[0].startswith("step-000000012: BAD: ")
    assert words in lines[0]


def test_diff_of_equals(tmp_path: Path, vitds: Any) -> None:
    one, other = (
        saved(tmp_path / "a" / "checkpoints"),
        saved(tmp_path / "b" / "checkpoints", world_size=8, zero_stage=3),
    )
    code, lines, _ = vitds("diff", tmp_path / "a", other)
    assert code == 0
    assert lines == [
        f"a: {one}",
        f"b: {other}",
        "model: 6 tensors on both sides, 6 equal bit for bit",
        "optimizer: 14 tensors on both sides, 14 equal bit for bit",
        "training_state.json: equal",
        "  (written by: world_size: 3 → 8)",
        "  (written by: zero_stage: 2 → 3)",
        "the same",
    ]


def test_diff_measures_each_tensor(tmp_path: Path, vitds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "CHUNK_ELEMENTS", 7)
    gaps: dict[str, float] = {}

    def change(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        before = weights["blocks.2.w"].double().clone()
        weights["blocks.2.w"][3, 1] += 0.5
        weights["blocks.2.w"][9, 2] -= 0.25
        after = weights["blocks.2.w"].double()
        gaps["relative"] = float((after - before).norm() / max(before.norm(), after.norm()))
        weights["pos_embed"].mul_(1 + 1e-6)
        weights["head.bias"][1] = 0.0  # it was −0.0: other bits, the same number
        state["blocks.2.w.exp_avg"][0, 0] = float("nan")
        state["blocks.2.w.step"] += 1

    one, other = saved(tmp_path / "a"), saved(tmp_path / "b", change, position=7, evaluation={})
    code, lines, _ = vitds("diff", one, other)
    assert code == 1
    model = lines.index("model: 6 tensors on both sides, 3 equal bit for bit, 3 differ")
    rows = [line.split() for line in lines[model + 2 : model + 5]]
    assert [row[4] for row in rows] == ["blocks.2.w", "pos_embed", "head.bias"], "worst first"
    assert float(rows[0][0]) == pytest.approx(gaps["relative"], rel=1e-3)
    assert rows[0][1:4] == ["5.000e-01", "2", "30"]
    assert 5e-7 < float(rows[1][0]) < 2e-6
    assert rows[2][:4] == ["0.000e+00", "0.000e+00", "1", "13"]
    state = next(i for i, line in enumerate(lines) if line.startswith("optimizer: 14"))
    assert lines[state].endswith("12 equal bit for bit, 2 differ")
    assert lines[state + 2].split()[:3] == ["inf", "inf", "1"]
    assert "  position: 1099511627776 → 7" in lines
    assert "  evaluation.eval/top1: 0.25 → (missing)" in lines
    assert lines[-1] == "different"

    def rounding(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        weights["pos_embed"].mul_(1 + 1e-6)

    near = saved(tmp_path / "c", rounding, evaluation={"eval/top1": 0.25 + 1e-9})
    assert vitds("diff", one, near)[0] == 1
    code, lines, _ = vitds("diff", one, near, "--tolerance", "1e-5")
    assert code == 0
    assert "model: 6 tensors on both sides, 5 equal bit for bit, 1 more within 1e-05" in lines
    assert vitds("diff", one, near, "--tolerance", "1e-7")[0] == 1

    def counted(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        state["blocks.2.w.step"] += 1

    assert vitds("diff", one, saved(tmp_path / "d", counted), "--tolerance", "1")[0] == 1, "a count has no tolerance"


def test_diff_names_what_only_one_side_has(tmp_path: Path, vitds: Any) -> None:
    def other_model(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        weights["head.kernel"] = weights.pop("head.bias")
        weights["blocks.10.w"] = weights["blocks.10.w"].reshape(2, 8)
        state["logit_scale.exp_avg"] = state["logit_scale.exp_avg"].float()

    one, other = averaged_checkpoint(tmp_path / "a", 12), saved(tmp_path / "b", other_model)
    code, lines, _ = vitds("diff", one, other)
    assert code == 1
    for line in (
        "  only in a: head.bias (13,) float32",
        "  only in b: head.kernel (13,) float32",
        "  blocks.10.w (4, 4) float32 in a, blocks.10.w (2, 8) float32 in b",
        "  logit_scale.exp_avg () bfloat16 in a, logit_scale.exp_avg () float32 in b",
        "model.ema: only in a",
    ):
        assert line in lines, line

    def one_more(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        weights["head.scale"] = torch.ones(1)

    plain = saved(tmp_path / "c")
    for sides in ((plain, saved(tmp_path / "d", one_more)), (tmp_path / "d", plain)):
        code, lines, _ = vitds("diff", *sides, "--tolerance", "9")
        assert code == 1
        assert any(line.endswith(": head.scale (1,) float32") for line in lines)
