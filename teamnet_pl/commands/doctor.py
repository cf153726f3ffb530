"""``teamnet doctor``: whether this machine is ready, and what could be installed."""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from teamnet_pl.errors import TeamNetError

_DISTRIBUTION = "teamnet_pl"
_SHOWN = ("torch", "torchvision", "lightning", "timm", "jsonargparse")
_DEVELOPMENT = ("dev", "test")
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?[^;]*(?:;.*extra == [\"']([\w-]+)[\"'])?")


def check_machine() -> None:
    """Tells versions, devices and optional libraries, and tries a step of training.

    Raises:
        TeamNetError: If the step fails, or a folder that commands write to cannot be written.
    """
    print(f"Python {platform.python_version()} on {platform.platform()}, {sys.executable}")
    for name in (_DISTRIBUTION, *_SHOWN):
        print(f"  {name:14}{version(name)}")
    _print_devices()
    _print_extras()
    problems = [*_folder_problems(), *_training_problems()]
    if problems:
        raise TeamNetError(" ".join(problems))
    print("All is well. To start: teamnet fit --config digits")


def _print_devices() -> None:
    import torch

    print("Devices")
    print(f"  cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"  cuda:{index}        {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        print("  mps           Apple GPU")


def extras() -> dict[str, list[str]]:
    """Lists the libraries that each extra of the package installs, by the extra's name."""
    libraries: dict[str, list[str]] = {}
    for requirement in requires(_DISTRIBUTION) or []:
        matched = _REQUIREMENT.fullmatch(requirement)
        if matched and matched[2] and matched[2] not in _DEVELOPMENT:
            libraries.setdefault(matched[2], []).append(matched[1])
    return libraries


def _print_extras() -> None:
    print("Optional libraries")
    for extra, libraries in sorted(extras().items()):
        missing = [name for name in libraries if not _is_installed(name)]
        state = f"no {', '.join(missing)}: pip install 'teamnet_pl[{extra}]'"
        print(f"  {extra:14}{state if missing else 'installed'}")


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _folder_problems() -> list[str]:
    """Tries the folders that commands write to: of runs, of data, of temporary files."""
    problems = []
    print("Folders")
    for name in ("logs", "data", tempfile.gettempdir()):
        folder = Path(name)
        exists = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        try:
            with tempfile.TemporaryFile(dir=exists):
                print(f"  {folder} can be written")
        except OSError as error:
            problems.append(f"{folder.absolute()} cannot be written: {error.strerror}.")
            print(f"  {folder} cannot be written: {error.strerror}")
    return problems


def _training_problems() -> list[str]:
    """Runs a step of training and of test of a small team."""
    from lightning.pytorch import Trainer

    from teamnet_pl.cooperation import Team
    from teamnet_pl.data import RandomImages

    begin = time.perf_counter()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, which are not about this machine
            data = RandomImages(input_shape=(3, 8, 8), batch_size=8)
            team = Team(data.num_classes, data.input_shape)
            trainer = Trainer(
                fast_dev_run=1, logger=False, enable_model_summary=False, enable_progress_bar=False
            )
            trainer.fit(team, data)
            trainer.test(team, data, verbose=False)
    except Exception as error:  # whatever is wrong with the machine
        return [f"A step of training failed ({type(error).__name__}): {error}"]
    device = trainer.strategy.root_device
    print(f"A step of training and of test passed on {device}, {time.perf_counter() - begin:.1f} s")
    return []
