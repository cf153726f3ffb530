"""``teamnet serve``: predictions over HTTP."""

from __future__ import annotations

from functools import partial

from teamnet_pl.deploy.runtime.predictor import Predictor
from teamnet_pl.deploy.runtime.preprocessing import MAX_PIXELS
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
    max_images: int = 32,
    max_pixels: int = MAX_PIXELS,
    host: str = "127.0.0.1",
    port: int = 8000,
    trust_import: bool = False,
) -> None:
    """Serves a Teammate's predictions over HTTP, each within a budget of time.

    ``POST /predict`` takes an image file as its body or a form of several, and ``budget_ms``,
    ``depth`` or ``macs`` as parameters. ``GET /livez``, ``GET /readyz`` and ``GET /metrics``
    (Prometheus) report the state of the server, ``GET /model`` describes the net.

    Args:
        ckpt_path: The checkpoint, a folder that ``save_pretrained`` wrote, or the name of a
            repository on the Hub, such as ``me/net``.
        teammate: Name of the Teammate in a checkpoint, such as ``a``.
        device: The device to run it on, such as ``cuda``.
        profile: File that ``teamnet profile`` wrote; by default a few runs are timed at the start.
        depths: Names of the depths to choose from; by default all.
        budget_ms: Budget of requests that do not give one, in milliseconds.
        max_batch_size: Largest number of images that run at once.
        max_body_bytes: Largest size of the body of a request, with all its images, in bytes.
        max_images: Largest number of images in a request.
        max_pixels: Largest number of pixels of an image.
        host: Address to listen at; 0.0.0.0 for all interfaces.
        port: Port to listen at; 0 for a free one.
        trust_import: Whether the checkpoint may name a backbone or a transform by import path,
            which runs code. Allow this only for a file that you trust as you trust code.

    Raises:
        FileNotFoundError: If there is no such file.
        TeamNetError: If the source does not hold a Teammate or has no such Teammate or depth,
            there is no such device, the profile is of another net, a number is not positive, or the
            server cannot listen at the address.
        ModuleNotFoundError: If the extra ``serve`` is not installed.
    """
    server = require("teamnet_pl.deploy.serving.server", "serve")
    # The address first: an error about it should not have to wait until the net is loaded.
    with server.listen(host, port) as listener:
        load = partial(
            Predictor.from_checkpoint,
            ckpt_path,
            teammate,
            device=device,
            profile=profile,
            depths=depths,
            batch_sizes=(1, max_batch_size),
            trust_import=trust_import,
        )
        endpoints = server.Server(
            load,
            budget_ms=budget_ms,
            max_batch_size=max_batch_size,
            max_body_bytes=max_body_bytes,
            max_images=max_images,
            max_pixels=max_pixels,
        )
        server.run(endpoints, listener)
