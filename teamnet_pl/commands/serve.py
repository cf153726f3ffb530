"""``teamnet serve``: predictions over HTTP."""

from __future__ import annotations

from teamnet_pl.deploy import Predictor
from teamnet_pl.deploy.images import MAX_PIXELS
from teamnet_pl.optional import require


def serve_teammate(
    ckpt_path: str,
    teammate: str = "a",
    device: str = "cpu",
    profile: str | None = None,
    depths: list[str] | None = None,
    budget_ms: float = 100,
    max_batch_size: int = 8,
    max_body_bytes: int = 2**22,
    max_pixels: int = MAX_PIXELS,
    host: str = "127.0.0.1",
    port: int = 8000,
    trust_import: bool = False,
) -> None:
    """Serves a Teammate's predictions over HTTP, each within a budget of time.

    ``POST /predict`` takes an image file as its body, and ``budget_ms``, ``depth`` or ``macs`` as
    parameters. ``GET /health`` and ``GET /metrics`` (Prometheus) tell how the server is.

    Args:
        ckpt_path: The checkpoint.
        teammate: ``a`` or ``b``.
        device: Where to run it, such as ``cuda``.
        profile: File that ``teamnet profile`` wrote; by default a few runs at the start tell.
        depths: Names of the depths to choose from; by default all.
        budget_ms: Budget of requests that name none, in milliseconds.
        max_batch_size: Images at once.
        max_body_bytes: Size of an image file that is accepted.
        max_pixels: Size of an image that is accepted.
        host: Address to listen at; 0.0.0.0 for all.
        port: Port to listen at; 0 for a free one.
        trust_import: Whether the checkpoint may name a backbone or a transform by import path,
            which runs code: only for a file that you trust as you do code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of a team or has no such Teammate or depth, there is
            no such device, the profile is of another net, a number is not positive, or the address
            cannot be listened at.
        ModuleNotFoundError: If the extra ``serve`` is not installed.
    """
    server = require("teamnet_pl.deploy.server", "serve")
    # First of all, or it would be found too late that the address cannot be had.
    with server.listen(host, port) as taken:
        predictor = Predictor.from_checkpoint(
            ckpt_path,
            teammate,
            device=device,
            profile=profile,
            depths=depths,
            batch_sizes=(1, max_batch_size),
            trust_import=trust_import,
        )
        endpoints = server.Server(
            predictor,
            budget_ms=budget_ms,
            max_batch_size=max_batch_size,
            max_body_bytes=max_body_bytes,
            max_pixels=max_pixels,
        )
        server.run(endpoints.app(), taken)
