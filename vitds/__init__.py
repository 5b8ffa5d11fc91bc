"""vitds: Vision Transformers of the "Scaling Vision Transformers" family, trained on DeepSpeed.

Importing the package registers its model, configuration and image processor with transformers' Auto classes and its
pipeline with transformers' pipelines, at once where transformers is there already, else as soon as somebody imports it: a
verb that needs neither, `vitds run` say, starts in a tenth of a second and not in six. It starts nothing and imports no
DeepSpeed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


class _After(MetaPathFinder):
    """Finds a module as Python would, but lets one of ours be imported behind it."""

    def __init__(self, name: str, ours: str) -> None:
        self._name, self._ours = name, ours

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                # Here, not when it was found: who only asks whether it is installed imports nothing.
                sys.meta_path.remove(self)
                importlib.import_module(self._ours)

            loader.exec_module = exec_module
        return spec


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("vitds.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for theirs, ours in (("transformers", "vitds.models"), ("transformers.pipelines", "vitds.models.pipeline")):
    if theirs in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _After(theirs, ours))
