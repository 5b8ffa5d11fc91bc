"""What a model is worth: classification of a held-out set."""

from vitds.evaluation.classification import evaluate, evaluate_each

__all__ = ["evaluate", "evaluate_each"]
