"""How a benchmark writes down what it measured."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from typing import Any

import torch


def processor(args: argparse.Namespace) -> str:
    """What ``args.device`` is, in words."""
    on_gpu = args.device == "cuda"
    return torch.cuda.get_device_name() if on_gpu else f"{args.threads} CPU threads"


def save_results(args: argparse.Namespace, rows: list[dict[str, Any]], *hardware: str) -> None:
    """Writes the rows to ``args.out``, with the command, the date and the machine."""
    done = {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "machine": ", ".join([platform.machine(), *hardware, f"torch {torch.__version__}"]),
        "settings": vars(args),
        "rows": rows,
    }
    with open(args.out, "w") as file:
        json.dump(done, file, indent=1)
