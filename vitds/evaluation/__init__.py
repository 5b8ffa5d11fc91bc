"""What a model is worth: classification of a held-out set."""

from vitds.evaluation.classification import evaluate

__all__ = ["evaluate"]
