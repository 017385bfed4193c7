"""A service that makes images: `python -m students.serve CHECKPOINT`."""

import asyncio
import hmac
import json
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field
from tyro.conf import Positional

from diffusion.condition import Condition, Guidance
from diffusion.console import UserError, at_least, doing, run, say
from diffusion.pictures import grid, png
from diffusion.plan import MOST_STEPS, Plan
from students import filters
from students.api import Checkpoint, ImageModel, load
from students.batcher import Batcher, Full, best_batch
from students.prompts import encode
from students.provenance import provenance
from students.shards import Batch, npz

PAGE = Path(__file__).parent / "pages" / "serve.html"
MOST_BYTES = 1 << 16  # of a request's body
PATIENCE = 10.0  # seconds for a request's body to come
LARGE = 1 << 16  # pixels
LAST = 60.0  # seconds for what has begun, after SIGTERM


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


class Asked(BaseModel):
    """Which images to make."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    num: Annotated[int, Field(ge=1)] = 1
    """How many images."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """Network calls for each image; the model's own number if left out."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of the noise."""
    first: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    """The number of the first image of the seed."""
    label: Annotated[int, Field(ge=0)] | None = None
    """The class to make; every class in turn if left out."""
    prompt: Annotated[str, Field(max_length=1000)] | None = None
    """What images shall show, for a model of captions."""
    guidance: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """How strongly images are pushed towards their class; the model's own weight if left out."""
    format: Literal["png", "npz"] = "png"
    """png: one picture, of several images a grid. npz: their pixels, N x H x W x C uint8."""


class Described(BaseModel):
    """What the service makes images with."""

    method: str
    sha256: str
    data: str
    shape: tuple[int, int, int]
    """Height, width and channels."""
    num_classes: int
    """0 for a model without classes."""
    steps: list[int]
    """The numbers of steps that a request may ask for."""
    usual_steps: int
    max_images: int
    batch_size: int


@dataclass
class Service:
    """A model behind a batcher, and what is counted."""

    maker: ImageModel
    options: Options
    size: int
    screen: filters.Filter | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    """Of one thread, for all that PyTorch does. OpenMP keeps threads for each that calls it, and
    lets all of them sleep between two calls once there are more than processors."""

    def __post_init__(self):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        count = ("status",)
        self.requests = Counter("fewstep_requests", "Requests answered", count, registry=registry)
        self.seconds = Histogram(
            "fewstep_request_seconds",
            "Seconds from a request for images to its answer",
            registry=registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.made = Counter("fewstep_images", "Images made", registry=registry)
        self.blocked = Counter("fewstep_blocked", "Images that were blocked", registry=registry)
        self.batches = Histogram(
            "fewstep_batch_images",
            "Images of a batch",
            registry=registry,
            buckets=[2**i for i in range(11)],
        )
        self.batcher = Batcher(
            self.maker,
            self.size,
            self.options.queue,
            self.screen,
            self._seen,
            self.options.exact,
            self.thread,
        )
        waiting = Gauge("fewstep_waiting_images", "Images that wait", registry=registry)
        waiting.set_function(lambda: self.batcher.waiting)
        plans = ((n, self._plan(n)) for n in range(1, self.options.max_steps + 1))
        self.steps = [n for n, plan in plans if plan]
        if not self.steps:
            raise UserError(
                f"this model makes no images in --max-steps {self.options.max_steps}: raise it"
            )

    def _plan(self, steps: int) -> Plan | None:
        try:
            return self.maker.plan(steps)
        except UserError:
            return None

    def _seen(self, images: int, blocked: int) -> None:
        self.made.inc(images)
        self.blocked.inc(blocked)
        self.batches.observe(images)

    @property
    def usual(self) -> int:
        """The steps of a request that names none: the model's own, or as many as it may ask for."""
        return min(self.maker.plan().num_steps, self.steps[-1])

    def described(self) -> Described:
        maker = self.maker
        return Described(
            method=maker.method,
            sha256=maker.sha256,
            data=maker.spec.name,
            shape=maker.shape,
            num_classes=maker.num_classes,
            steps=self.steps,
            usual_steps=self.usual,
            max_images=self.options.max_images,
            batch_size=self.size,
        )

    def _prompt(self, prompt: str, plan: Plan, rows: torch.Tensor) -> Condition:
        if not isinstance(self.maker, Checkpoint):
            raise UserError("prompt needs a model of captions: leave it out")
        return encode(self.maker.model, plan, [prompt]).condition(rows)

    async def images(self, asked: Asked) -> tuple[bytes, dict[str, str]]:
        """A request's file, and headers that say how it was made. UserError, Full."""
        limits = (("num", asked.num, self.options.max_images),)
        limits += (("steps", asked.steps or 1, self.options.max_steps),)
        for name, value, most in limits:
            if value > most:
                raise UserError(f"{name} must be at most {most}, got {value}")
        maker, begun = self.maker, time.perf_counter()
        plan = maker.plan(asked.steps or self.usual, guidance=asked.guidance)
        numbers = range(asked.first, asked.first + asked.num)
        given = maker.labels(asked.label, asked.num)
        rows = torch.tensor(numbers, device=maker.device)
        if asked.prompt is not None:
            loop = asyncio.get_running_loop()
            given |= await loop.run_in_executor(self.thread, self._prompt, asked.prompt, plan, rows)
        condition = {
            name: given.get(name, kind.rows(rows))
            for name, kind in maker.kinds.items()
            if not isinstance(kind, Guidance)
        }
        images, blocked = await self.batcher.images(plan, asked.seed, numbers, condition)
        texts = {}
        if self.options.metadata:
            texts = provenance(
                maker.sha256,
                maker.method,
                plan,
                asked.seed,
                first=asked.first,
                label=asked.label,
                prompt=asked.prompt,
            )
        facts = {"blocked": blocked} if self.screen else {}
        batch = Batch(asked.first, images, facts, texts)
        large = images.numel() > LARGE  # what is small is packed before a thread would wake
        pack = asyncio.to_thread(_file, batch, asked.format) if large else None
        content = await pack if pack else _file(batch, asked.format)
        headers = {
            "X-Steps": str(plan.num_steps),
            "X-Sampler": plan.sampler,
            "X-Blocked": str(int(blocked.sum())),
            "X-Seconds": f"{time.perf_counter() - begun:.4f}",
        }
        return content, headers


def _file(batch: Batch, form: str) -> bytes:
    if form == "npz":
        return npz([batch])
    if len(batch.images) == 1:
        return png(batch.images[0], batch.texts_of(0))
    return png(grid(batch.images), batch.texts)


class Guard:
    """ASGI middleware: who may ask, how much may be sent, how slowly; and what is counted."""

    OPEN = ("/", "/health", "/docs", "/openapi.json")

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, path = time.perf_counter(), scope["path"]

        async def counted(message: dict) -> None:
            if message["type"] == "http.response.start" and path == "/images":
                self.service.requests.labels(message["status"]).inc()
                self.service.seconds.observe(time.perf_counter() - begun)
            await send(message)

        if not self._allowed(path, dict(scope["headers"])):
            await _answer(counted, 401, "expected the header Authorization: Bearer TOKEN")
            return
        try:
            body = await asyncio.wait_for(_body(receive), PATIENCE)
        except TimeoutError:
            await _answer(counted, 408, f"the request did not come within {PATIENCE:.0f} s")
            return
        if body is None:  # gone
            return
        if len(body) > MOST_BYTES:
            await _answer(counted, 413, f"a request may have {MOST_BYTES} bytes")
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> dict:
            return next(messages, None) or await receive()

        await self.app(scope, again, counted)

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        token = self.service.options.token
        if not token or path in self.OPEN or path.startswith("/docs/"):
            return True
        said = headers.get(b"authorization", b"")
        return hmac.compare_digest(said, f"Bearer {token}".encode())


async def _body(receive: Callable[[], Awaitable[dict]]) -> bytes | None:
    """A request's body, or more than MOST_BYTES of it; None of a client that left."""
    body = b""
    while len(body) <= MOST_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return body


async def _answer(send: Callable, status: int, detail: str) -> None:
    content = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def application(service: Service) -> Any:
    """The service as an ASGI application."""
    from fastapi import FastAPI, Request
    from fastapi.openapi.docs import get_swagger_ui_html
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from fastapi.staticfiles import StaticFiles
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    @asynccontextmanager
    async def batching(_: FastAPI) -> AsyncGenerator[None]:
        work = asyncio.create_task(service.batcher.run())
        yield
        work.cancel()

    app = FastAPI(title="fewstep", lifespan=batching, docs_url=None, redoc_url=None, version="1")

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> Response:
        headers = {"Retry-After": f"{error.seconds:.0f}"}
        return JSONResponse({"detail": str(error)}, 429, headers)

    responses: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/png": {}, "application/octet-stream": {}}},
        401: {"description": "no token, or a wrong one"},
        429: {"description": "too many images wait; Retry-After says how many seconds"},
    }

    @app.post("/images", response_class=Response, responses=responses)
    async def images(asked: Asked, request: Request) -> Response:
        """Make images: image i of a seed is always the same one."""
        work = asyncio.ensure_future(service.images(asked))
        left = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody listens
            content, headers = work.result()
        finally:
            left.cancel()
            work.cancel()
        kind = "image/png" if asked.format == "png" else "application/octet-stream"
        return Response(content, media_type=kind, headers=headers)

    @app.get("/model")
    async def model() -> Described:
        """What the service makes images with, and what it may be asked for."""
        return service.described()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether it answers, and how many images wait."""
        return {"status": "ok", "waiting": service.batcher.waiting}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def gallery() -> str:
        return PAGE.read_text()

    swagger = _swagger()
    if swagger:  # from this machine: the page works without a network
        app.mount("/docs/files", StaticFiles(directory=swagger))

        @app.get("/docs", include_in_schema=False)
        async def interface() -> HTMLResponse:
            return get_swagger_ui_html(
                openapi_url="/openapi.json",
                title="fewstep",
                swagger_js_url="/docs/files/swagger-ui-bundle.js",
                swagger_css_url="/docs/files/swagger-ui.css",
                swagger_favicon_url="/docs/files/favicon-32x32.png",
            )

    app.add_middleware(Guard, service=service)
    return app


async def _gone(request: Any) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _swagger() -> Path | None:
    try:
        from swagger_ui_bundle import swagger_ui_path
    except ImportError:
        return None
    return Path(swagger_ui_path)


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
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"students.serve needs {error.name}, which is not here: pip install fewstep[serve]"
        ) from None
    at_least(1, options, "max_images", "max_steps", "queue", "batch_size")
    if options.queue < options.max_images:
        raise UserError(
            f"--queue must be at least --max-images {options.max_images}, got {options.queue}"
        )
    token = options.token or os.environ.get("FEWSTEP_TOKEN") or None
    listens = listening(options.host, options.port)
    screen = filters.load(options.filter, options.filter_threshold) if options.filter else None
    thread = ThreadPoolExecutor(1)

    def ready() -> tuple[ImageModel, int]:
        maker = load(options.checkpoint, precision=options.precision)
        size = options.batch_size or best_batch(maker, maker.plan(), options.max_images)
        return maker, size

    with doing(f"starting to serve {options.checkpoint}", "nothing is served"):
        maker, size = thread.submit(ready).result()
    service = Service(maker, replace(options, token=token), size, screen, thread)
    host, port = listens.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    say(f"serving {options.checkpoint} at http://{place}:{port}, {size} images a batch")
    if not token and host not in ("127.0.0.1", "::1"):
        say("anyone who reaches this address may ask for images: give a --token")
    config = uvicorn.Config(
        application(service),
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=int(LAST),
    )
    uvicorn.Server(config).run(sockets=[listens])


if __name__ == "__main__":
    run(main)
