"""Images in: where they come from, in what order, what is done to them, and which rank gets which."""

from vitds.data.bad_samples import BadSample, BadSamples, TooManyBad
from vitds.data.batch import Batch, to_model_range
from vitds.data.loader import EvalLoader, TrainLoader
from vitds.data.order import order
from vitds.data.randomness import augmentation_rng
from vitds.data.section import DataSection, SourceSection
from vitds.data.source import Source
from vitds.data.sources import SOURCES, Sources, build_source, build_sources
from vitds.data.transforms import TRANSFORMS

__all__ = [
    "SOURCES",
    "TRANSFORMS",
    "BadSample",
    "BadSamples",
    "Batch",
    "DataSection",
    "EvalLoader",
    "Source",
    "SourceSection",
    "Sources",
    "TooManyBad",
    "TrainLoader",
    "augmentation_rng",
    "build_source",
    "build_sources",
    "order",
    "to_model_range",
]
