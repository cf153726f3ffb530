"""Libraries that only some datasets need."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a library that may not be installed.

    Args:
        module: Its name.
        extra: The extra of this package that brings it.

    Raises:
        ModuleNotFoundError: It isn't installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"This dataset needs {module}, which isn't installed: pip install 'teamnet_pl[{extra}]'"
        ) from error
