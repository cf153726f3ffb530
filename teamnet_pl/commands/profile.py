"""``teamnet profile``: what each depth takes on this machine."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from teamnet_pl.deploy.hub import Teammate
from teamnet_pl.deploy.profile import (
    draw_profile,
    profile_depths,
    profile_table,
    with_accuracies,
)


def profile_teammate(
    ckpt_path: str,
    teammate: str = "a",
    device: str = "cpu",
    batch_sizes: list[int] = [1, 8],  # noqa: B006 (never changed; None would hide it in the help)
    runs: int = 50,
    trust_import: bool = False,
) -> None:
    """Measures latency and memory of each depth of a Teammate on this machine.

    Prints a table, and saves ``profile_<teammate>_<device>.json`` beside the checkpoint. With the
    accuracies of ``per_depth.json`` there, if it is of these very weights, it also draws accuracy
    against latency. On the processor, ``OMP_NUM_THREADS`` sets the number of threads, as for all of
    torch.

    Args:
        ckpt_path: The checkpoint.
        teammate: ``a`` or ``b``.
        device: Where to run it, such as ``cuda``.
        batch_sizes: Numbers of images at once.
        runs: How often each depth and batch size is timed.
        trust_import: Whether the checkpoint may name a backbone by import path, which runs code:
            only for a file that you trust as you do code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a team or has no such Teammate, there is no such
            device, or a number is not positive.
    """
    net = Teammate.from_checkpoint(ckpt_path, teammate, device=device, trust_import=trust_import)
    views = {depth.name: net.view(depth) for depth in net.depths}
    measured = profile_depths(net, views, batch_sizes, runs)
    if net.accuracy:
        measured = with_accuracies(measured, net.accuracy, net.split)
    console = Console()
    console.print(profile_table(measured))  # first, since the folder may be read-only
    path = Path(ckpt_path).parent / f"profile_{teammate}_{measured.device}.json"
    measured.save(path)
    if net.accuracy:
        draw_profile(measured).savefig(path.with_suffix(".png"), dpi=150)
    console.print(f"Saved as {path}", soft_wrap=True)
    if measured.split is None:
        console.print("Without accuracies of these weights: `teamnet test` leaves them there.")
