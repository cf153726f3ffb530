"""Libraries that not every installation has."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a library that not every installation has.

    Args:
        module: What to import.
        extra: The extra of this package that installs it.

    Raises:
        ModuleNotFoundError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"This needs {error.name}, which is not installed: pip install 'teamnet_pl[{extra}]'"
        ) from error
