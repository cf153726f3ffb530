"""Weights to start from, in the forms in which training scripts save them."""

from __future__ import annotations

import argparse
from typing import Any

from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.errors import TeamNetError

_LAST = ("state_dict", "model", "model_state_dict")
_AVERAGED = ("state_dict_ema", "model_ema")
"""Entries of files that the scripts of Lightning, timm and torchvision write."""


def read_weights(path: str, prefix: str = "", *, averaged: bool = False) -> dict[str, Any]:
    """Reads a state dict, alone or within what a training script saves.

    Names lose the prefixes of wrappers: ``module.`` of data-parallel and averaged models,
    ``_orig_mod.`` of compiled ones.

    Args:
        path: File in safetensors or PyTorch's format.
        prefix: The beginning of the names of the weights to take, which they lose.
        averaged: Whether to take the moving average of the weights instead of the last ones.

    Raises:
        FileNotFoundError: If there is no such file.
        TeamNetError: If it is not such a file, or has no averaged weights although they are asked
            for, or no names with the prefix.
    """
    from timm.models import clean_state_dict

    # The arguments of timm's and torchvision's scripts: plain values, which run nothing.
    content = load_checkpoint(path, plain_classes=[argparse.Namespace])
    entries = [
        name for name in (_AVERAGED if averaged else _LAST) if isinstance(content.get(name), dict)
    ]
    if averaged and not entries:
        raise TeamNetError(
            f"{path} has no averaged weights ({' or '.join(_AVERAGED)}): it has "
            f"{_listed(content)}. Leave checkpoint_averaged out for the weights that it has."
        )
    state = content[entries[0]] if entries else content
    weights = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    if not weights:
        raise TeamNetError(
            f"{path} has no weights whose names begin with {prefix!r}: they begin with "
            f"{_listed({str(name).partition('.')[0]: None for name in state}) or 'nothing'}. Give "
            "another checkpoint_prefix."
        )
    cleaned: dict[str, Any] = clean_state_dict(weights)
    cleaned.pop("n_averaged", None)  # of torch's AveragedModel
    return cleaned


def _listed(names: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, names))[:8])
