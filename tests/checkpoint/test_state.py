"""What a start says of the cost of saving."""

from __future__ import annotations

from vitds.checkpoint.state import cost_of_saving


def test_a_save_that_may_not_end_before_the_job_is_killed_is_warned_of() -> None:
    # DeepSpeed's launcher gives its ranks 30 s; the warning begins at 20, for a save in flight and one more.
    assert "warning" not in cost_of_saving(900_000_000, 1e8)
    slow = cost_of_saving(1_100_000_000, 1e8)
    assert "1.10 GB a rank: about 11 s at the 100 MB/s" in slow
    assert "warning: a preempted job is killed 30 s after its notice" in slow
