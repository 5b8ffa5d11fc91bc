"""What a start says of the cost of saving, and from which checkpoints it does not go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitds.checkpoint.start import Start
from vitds.checkpoint.state import cost_of_saving
from vitds.errors import UserError
from vitds.schedules import Schedule, build_schedule


def test_a_save_that_may_not_end_before_the_job_is_killed_is_warned_of() -> None:
    # DeepSpeed's launcher gives its ranks 30 s; the warning begins at 20, for a save in flight and one more.
    assert "warning" not in cost_of_saving(900_000_000, 1e8)
    slow = cost_of_saving(1_100_000_000, 1e8)
    assert "1.10 GB a rank: about 11 s at the 100 MB/s" in slow
    assert "warning: a preempted job is killed 30 s after its notice" in slow


def schedule(total: int) -> Schedule:
    params = {"warmup_steps": 2, "timescale_steps": 4, "cooldown_steps": 4}
    return build_schedule({"type": "rsqrt", "params": params}, total_steps=total, global_batch=24)


@pytest.mark.parametrize(
    ("step", "refused"),
    [
        (8, None),
        (9, None),  # step 8 still has the whole rate: the first update of the cooldown has a factor of 4/4
        (10, "step 9 would have had the rate factor"),
        (12, "step 9 would have had the rate factor"),
        (17, "is 17 steps on, the run file's total is 16"),
    ],
)
def test_a_cooldown_is_forked_only_from_before_it(step: int, refused: str | None) -> None:
    """A trunk of 12 steps (of 20 for the last), gone on from with 16."""
    resolved = {"optimizer": {"type": "Adam"}, "vitds": {"train": {"seed": 0}}, "train_batch_size": 24}

    def read_into(tensors: Any) -> None:
        raise InterruptedError("nothing is refused any more")

    engine: Any = SimpleNamespace(groups={}, master_shards=list, state_shards=lambda to_fill: [])
    start = Start(engine, SimpleNamespace(), schedule(16), resolved, None)  # type: ignore[arg-type]
    past = schedule(12 if step <= 12 else 20).to_json()
    state = {"optimizer": {"type": "Adam"}, "stream": start.identity(), "schedule": past}
    checkpoint: Any = SimpleNamespace(
        path=Path("trunk"), step=step, training_state=state, kinds={}, read_into=read_into
    )
    with pytest.raises(UserError if refused else InterruptedError, match=refused or "nothing is refused"):
        start.resume(checkpoint)


@pytest.mark.parametrize(
    ("there", "here"), [("windowed", "full"), (None, "windowed"), (None, "full"), ("full", "full")]
)
def test_a_fork_keeps_the_order_of_the_images(there: str | None, here: str) -> None:
    def started(order: str | None) -> Start:
        section = {} if order is None else {"order": {"kind": order, "run_images": 16}}
        part = {"train": {"seed": 0}, "data": section}
        resolved = {"optimizer": {"type": "Adam"}, "vitds": part, "train_batch_size": 24}
        return Start(engine, SimpleNamespace(), schedule(16), resolved, None)  # type: ignore[arg-type]

    def read_into(tensors: Any) -> None:
        raise InterruptedError("nothing is refused any more")

    engine: Any = SimpleNamespace(groups={}, master_shards=list, state_shards=lambda to_fill: [])
    stream = started(there).identity()
    if there is None:  # saved before there was another order
        del stream["order"]
    state = {"optimizer": {"type": "Adam"}, "stream": stream, "schedule": schedule(16).to_json()}
    checkpoint: Any = SimpleNamespace(path=Path("trunk"), step=4, training_state=state, kinds={}, read_into=read_into)
    refused = (there or "full") != here
    with pytest.raises(UserError if refused else InterruptedError, match="order: {'kind': " if refused else None):
        started(here).resume(checkpoint)
