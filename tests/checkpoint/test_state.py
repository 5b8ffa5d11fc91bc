"""What a start says of the cost of saving."""

from __future__ import annotations

from vitds.checkpoint.state import cost_of_saving


def test_a_save_that_may_not_end_before_the_job_is_killed_is_warned_of() -> None:
    # DeepSpeed's launcher gives its ranks 30 s; the warning begins at 20.
    assert "warning" not in cost_of_saving(1_900_000_000, 1e8)
    slow = cost_of_saving(2_100_000_000, 1e8)
    assert "2.10 GB a rank: about 21 s at the 100 MB/s" in slow
    assert "warning: a preempted job is killed 30 s after its notice" in slow
