"""What a model is worth: classification of a held-out set, and the few-shot probe of its features."""

from vitds.evaluation.classification import evaluate
from vitds.evaluation.evaluations import Evaluations
from vitds.evaluation.probe_sets import FewshotSection, ProbeSet, open_sets

__all__ = ["Evaluations", "FewshotSection", "ProbeSet", "evaluate", "open_sets"]
