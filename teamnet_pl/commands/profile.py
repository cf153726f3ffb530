"""``teamnet profile``: latency, memory and arithmetic of each depth on this machine."""

from __future__ import annotations

from pathlib import Path

from teamnet_pl.deploy.runtime import measuring
from teamnet_pl.deploy.runtime.profile_report import draw_profile, profile_table
from teamnet_pl.deploy.teammate import Teammate
from teamnet_pl.places import short_path


def profile_teammate(
    ckpt_path: str,
    teammate: str = "a",
    device: str = "cpu",
    batch_sizes: list[int] = [1, 8],  # noqa: B006 (never changed; None would hide it in the help)
    runs: int = 50,
    trust_import: bool = False,
) -> None:
    """Measures the latency and memory of each depth of a Teammate on this machine.

    Prints a table, and saves ``profile_<teammate>_<device>.json`` beside the checkpoint, in the
    folder, or, for a net of the Hub, in the current folder. If
    ``per_depth.json`` beside it has the accuracies of the same weights, it also draws accuracy
    against latency. On the CPU the environment variable ``OMP_NUM_THREADS`` sets the number of
    threads, as for all of torch.

    Args:
        ckpt_path: The checkpoint, a folder that ``save_pretrained`` wrote, or the name of a
            repository on the Hub, such as ``me/net``.
        teammate: Name of the Teammate in a checkpoint, such as ``a``.
        device: The device to run it on, such as ``cuda``.
        batch_sizes: Numbers of images that run at once.
        runs: Number of timed runs of each depth and batch size.
        trust_import: Whether the checkpoint may name a backbone by import path, which runs code.
            Allow this only for a file that you trust as you trust code.

    Raises:
        FileNotFoundError: If there is no such file.
        TeamNetError: If the source does not hold a Teammate or has no such Teammate, there is no
            such device, or a number is not positive.
    """
    from rich.console import Console

    net = Teammate.load(ckpt_path, teammate, device=device, trust_import=trust_import)
    profile = measuring.profile_teammate(net, batch_sizes, runs)
    console = Console()
    console.print(profile_table(profile))  # first, since the folder may be read-only
    source = Path(ckpt_path)
    folder = source if source.is_dir() else source.parent if source.exists() else Path()
    path = folder / f"profile_{teammate}_{profile.device}.json"
    profile.save(path)
    if net.accuracy:
        draw_profile(profile).savefig(path.with_suffix(".png"), dpi=150)
    console.print(f"Saved as {short_path(path)}", soft_wrap=True)
    if profile.split is None:
        console.print(
            "There are no accuracies of these weights: `teamnet test` saves them beside the "
            "checkpoint."
        )
