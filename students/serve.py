"""A service that makes images: `python -m students.serve CHECKPOINT`."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from diffusion.console import UserError, at_least, doing, run, say
from students import filters
from students.api import ImageModel, load
from students.batcher import best_batch

LAST = 60  # seconds for what has begun, after SIGTERM


@dataclass(frozen=True)
class Options:
    """Serve a checkpoint over HTTP: POST /images, a page to try it at /, its interface at /docs.

    Requests that wait at the same time share a batch. Image i of a seed is the one that
    students.generate makes, whatever shares its batch.
    """

    checkpoint: Positional[Path]
    """The model: a run's folder or a .safetensors file."""
    host: str = "127.0.0.1"
    """The address to listen at. The default is reached from this machine alone."""
    port: int = 8000
    """The port; 0 takes a free one."""
    token: str | None = None
    """What requests must say, as `Authorization: Bearer TOKEN`. If left out: FEWSTEP_TOKEN of the
    environment, where other users of the machine cannot read it, or none."""
    max_images: int = 256
    """Images that one request may ask for."""
    max_steps: int = 64
    """Steps that one request may ask for."""
    queue: int = 1024
    """Images that may wait. Requests beyond are answered by 429."""
    batch_size: int | None = None
    """Images that the network makes at a time. If left out: measured at the start."""
    exact: bool = False
    """Fill every batch up to --batch-size: an image then has the same bits whatever shares its
    batch, and one alone takes as long as a batch. Without, batches below eight may round a pixel of
    30,000 to the next grey level."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the network. auto: the faster one on this machine."""
    filter: str | None = None
    """What scores every image: an ONNX classifier's file, or module:package.module:function. Images
    of --filter-threshold and above are replaced by plain grey ones, and counted."""
    filter_threshold: float = 0.5
    """The score from which an image is blocked."""
    metadata: bool = True
    """Images say how they were made."""


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError where the address or the port is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listens = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port} cannot be listened at ({error}): give another --port"
        ) from error
    # connections inherit it; without, an answer's second part waits 40 ms for the first's receipt
    listens.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listens


def main() -> None:
    options = tyro.cli(Options, prog="python -m students.serve")
    try:
        import uvicorn

        from students.service import Service
        from students.web import application
    except ImportError as error:
        raise UserError(
            f"students.serve needs {error.name}, which is not here: pip install fewstep[serve]"
        ) from None
    at_least(1, options, "max_images", "max_steps", "queue", "batch_size")
    if options.queue < options.max_images:
        raise UserError(
            f"--queue must be at least --max-images {options.max_images}, got {options.queue}"
        )
    options = replace(options, token=options.token or os.environ.get("FEWSTEP_TOKEN") or None)
    listens = listening(options.host, options.port)
    screen = filters.load(options.filter, options.filter_threshold) if options.filter else None
    thread = ThreadPoolExecutor(1)

    def ready() -> tuple[ImageModel, int]:
        maker = load(options.checkpoint, precision=options.precision)
        return maker, options.batch_size or best_batch(maker, maker.plan(), options.max_images)

    with doing(f"starting to serve {options.checkpoint}", "nothing is served"):
        maker, size = thread.submit(ready).result()
    app = application(Service(maker, options, size, screen, thread))
    host, port = listens.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    say(f"serving {options.checkpoint} at http://{place}:{port}, {size} images a batch")
    if not options.token and host not in ("127.0.0.1", "::1"):
        say("anyone who reaches this address may ask for images: give a --token")
    config = uvicorn.Config(
        app, log_level="error", access_log=False, timeout_graceful_shutdown=LAST
    )
    uvicorn.Server(config).run(sockets=[listens])


if __name__ == "__main__":
    run(main)
