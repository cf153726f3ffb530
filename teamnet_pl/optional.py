"""Libraries that are installed by extras of this package only."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a library that an extra of this package installs.

    Args:
        module: The module to import.
        extra: The extra that installs it.

    Raises:
        ModuleNotFoundError: If the library is not installed; the message has the command that
            installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"This needs {error.name}, which is not installed: pip install 'teamnet_pl[{extra}]'"
        ) from error
