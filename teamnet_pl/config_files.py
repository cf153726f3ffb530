"""The configs that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from teamnet_pl.errors import TeamNetError
from teamnet_pl.suggestions import did_you_mean

_FOLDER = Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """Lists the names of the configs, such as ``digits`` and ``data/cifar10``."""
    files = set(_FOLDER.rglob("*.yaml")) - {_FOLDER / "sweep.yaml"}  # which is for wandb
    names = [path.relative_to(_FOLDER).with_suffix("") for path in files]
    return sorted((name.as_posix() for name in names), key=lambda name: (name.count("/"), name))


def config_path(name: str) -> Path:
    """Returns the file of a config.

    Args:
        name: A file, or the name of a config that comes with the package.

    Raises:
        TeamNetError: If it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    names = config_names()
    if name.removesuffix(".yaml") in names:
        return _FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    raise TeamNetError(
        f"There is no config file {name}, and no config of that name comes with the package. "
        f"{did_you_mean(name, names)} `teamnet configs` lists the names."
    )


def config_summary(name: str) -> str:
    """Returns the first line of the comment at the top of a config.

    Args:
        name: Name of a config that comes with the package.
    """
    first, _, _ = config_path(name).read_text().partition("\n")
    return first.removeprefix("# ")
