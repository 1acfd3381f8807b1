"""Import paths that documents named and that have moved: they work for one version more, with a warning."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "tkn.data.module": "tkn.training.batches",
    "tkn.engine.fourier": "tkn.backends.torch.fourier",
    "tkn.engine.weigh": "tkn.backends.torch.weigh",
    "tkn.interrupt": "tkn.app.signals",
    "tkn.training.graph": "tkn.training.cuda_graphs",
    "tkn.training.memory": "tkn.app.memory",
}


class _MovedModules(MetaPathFinder, Loader):
    """Python asks it last, for modules that nothing else finds."""

    def find_spec(self, name: str, _path: object, _target: object = None) -> ModuleSpec | None:
        # A package of which nothing is left is found too, for the modules that were in it.
        if any(old == name or old.startswith(f"{name}.") for old in MOVED):
            return ModuleSpec(name, self, is_package=name not in MOVED)
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        if old in MOVED:
            text = f"{old} is {MOVED[old]} now; the old path goes with the next version"
            warnings.warn(text, FutureWarning, stacklevel=2)
            # An import statement takes the module that stands here.
            sys.modules[old] = import_module(MOVED[old])


sys.meta_path.append(_MovedModules())
