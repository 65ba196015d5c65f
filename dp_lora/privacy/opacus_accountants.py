"""Opacus' accountants without the rest of Opacus: they compute with numpy and scipy, the rest imports torch.

So a dry run, which cross-checks its plan, starts in half the time. The accountants' own code runs unchanged.
"""

import functools
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAMES = "opacus.accountants", "opacus.accountants.utils"


@functools.cache
def accountants() -> tuple[Any, Any]:
    """The modules `opacus.accountants` and `opacus.accountants.utils`, without importing `opacus` itself.

    During the import two empty modules stand in: for `opacus`, whose own code is not run, and for `opacus.optimizers`,
    from which the accountants take one class, for a type annotation. A later import of Opacus imports all of it.

    Guarantee: none is needed: these modules serve a cross-check, or the accounting of the released code.
    """
    if "opacus" in sys.modules:
        first, second = map(import_module, NAMES)
        return first, second
    spec = find_spec("opacus")
    if spec is None:
        raise ModuleNotFoundError("opacus is not installed")
    package, optimizers = ModuleType("opacus"), ModuleType("opacus.optimizers")
    package.__path__ = list(spec.submodule_search_locations or [])
    vars(optimizers)["DPOptimizer"] = object
    sys.modules.update({"opacus": package, "opacus.optimizers": optimizers})
    try:
        first, second = map(import_module, NAMES)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
            del sys.modules[name]
    return first, second
