"""What is measured and where it goes: one row per logged step to console, metrics.jsonl and the monitors.

Metric names, all over the project: train/loss, train/lr, train/grad_norm, train/images_seen, perf/images_per_second,
perf/mfu, perf/data_wait, perf/peak_memory_gib, eval/top1, eval/top5, fewshot/<set>_<k>shot, and at an interval
train/grad_norm/<block>, train/param_norm/<block>, train/update_rms/<block>. Fractions are 0 to 1.
"""

from vitds.metrics.blocks import block_norms, group_by_block
from vitds.metrics.monitors import CsvSection, MonitorSections, TensorBoardSection, WandbSection, monitor_sections
from vitds.metrics.profile import StepProfile, Window
from vitds.metrics.recorder import Recorder, closing_lines, read_metrics
from vitds.metrics.speed import Peak, Speedometer, Throughput, device_peak, mfu, named_peak, peak_memory_gib

__all__ = [
    "CsvSection",
    "MonitorSections",
    "Peak",
    "Recorder",
    "Speedometer",
    "StepProfile",
    "TensorBoardSection",
    "Throughput",
    "WandbSection",
    "Window",
    "block_norms",
    "closing_lines",
    "device_peak",
    "group_by_block",
    "mfu",
    "monitor_sections",
    "named_peak",
    "peak_memory_gib",
    "read_metrics",
]
