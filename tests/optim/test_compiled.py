"""The kernels compile for a GPU that is not here, and load and store 16 bytes at a time where elements lie aligned."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

POINTERS = {"table": "*i64", "moment": "*i16"}
INTEGERS = {"step": "i32"}


def compiled_here() -> None:
    """Run as a program, where nothing is interpreted: prints {kernel: {"loads": […], "stores": […], "size": bytes}}."""
    from triton import compile as compile_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vitds.optim.kernels import elementwise, factored, tables

    tile = {"RECORD": tables.TILE_RECORD, "COLUMNS": tables.COLUMNS, "ALIGN": tables.ALIGN}
    summing, moving = tile | {"ROWS": factored.ROWS_TO_SUM}, tile | {"ROWS": factored.ROWS_TO_MOVE}
    run = {"RECORD": tables.RUN_RECORD, "BLOCK": elementwise.BLOCK}
    wide, ragged = {"ALIGNED": True, "UNIT": True}, {"ALIGNED": False, "UNIT": False}
    measures = {"MEASURES": True, "CLIPS": False}
    moves = {"MEASURES": False, "CLIPS": True}
    half = {"weights": "*i16", "grad": "*i16"}
    mixed = {"grad": "*i16"}
    cases = {
        "adam": (elementwise._step, run | {"KIND": 0, "CLIPS": False}, {}),
        "adam, bf16": (elementwise._step, run | {"KIND": 0, "CLIPS": False}, half),
        "sgd, bf16 gradients": (elementwise._step, run | {"KIND": 1, "CLIPS": False}, mixed),
        "unfactored": (elementwise._step, run | {"KIND": 2, "CLIPS": True}, {}),
        "measured": (elementwise._step, run | {"KIND": 3, "CLIPS": False}, {}),
        "sums": (factored._sum_tiles, summing | wide, {}),
        "sums, ragged": (factored._sum_tiles, summing | ragged, mixed),
        "weights": (factored._move_tiles, moving | wide | moves, {}),
        "weights, bf16": (factored._move_tiles, moving | wide | moves, half),
        "weights, ragged": (factored._move_tiles, moving | ragged | moves, half),
        "weights, measured": (factored._move_tiles, moving | wide | measures, {}),
        "gathered": (factored._gather, {"RECORD": tables.SUM_RECORD, "OUTPUTS": tables.GATHERED}, {}),
        "factors": (factored._finish, {"RECORD": tables.FACTOR_RECORD, "COUNT": tables.GATHERED}, {}),
        "slots": (factored._add_slots, {"COUNT": tables.GATHERED}, {}),
    }
    found = {}
    for name, (kernel, constants, types) in cases.items():
        scalars = {
            "lr", "decay", "keep1", "new1", "keep2", "new2", "ratio", "eps", "bound", "keep", "new",
        }  # fmt: skip
        known = POINTERS | INTEGERS | dict.fromkeys(scalars, "fp32") | types | dict.fromkeys(constants, "constexpr")
        signature = {n: known.get(n, "*fp32") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
        made = compile_for(source, target=GPUTarget("cuda", 90, 32))
        words = [w for w in made.asm["ptx"].split() if w.startswith(("ld.g", "st.g"))]
        found[name] = {"loads": sorted({w for w in words if w.startswith("ld")}), "size": len(made.asm["cubin"]),
                       "stores": sorted({w for w in words if w.startswith("st")})}  # fmt: skip
    print(json.dumps(found))


def test_every_kernel_compiles_for_sm_90_and_moves_aligned_elements_in_wide_words():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.test_compiled"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 14
    assert all(case["size"] > 1000 for case in found.values())
    for name in ("sums", "weights", "weights, bf16"):
        loads = {word for word in found[name]["loads"] if not word.endswith("b64")}  # records are of 64 bits
        assert "ld.global.v4.b32" in loads, (name, loads)
    for name in ("weights", "weights, bf16"):
        assert found[name]["stores"] == ["st.global.v4.b32"], (name, found[name]["stores"])
    for name in ("adam", "adam, bf16"):
        assert {"ld.global.v4.b32"} <= set(found[name]["loads"]), name
        assert {"st.global.v4.b32"} <= set(found[name]["stores"]), name
    assert "ld.global.v4.b32" not in found["weights, ragged"]["loads"]


if __name__ == "__main__":
    compiled_here()
