"""The service over HTTP: who may ask, what is answered, and the pages."""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.console import UserError
from students.batcher import Full
from students.service import Asked, Described, Service

PAGE = Path(__file__).parent / "pages" / "serve.html"
MOST_BYTES = 1 << 16  # of a request's body
PATIENCE = 10.0  # seconds for a request's body to come
OPEN = ("/", "/health", "/docs", "/openapi.json")  # to all, whatever the token
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}, "application/octet-stream": {}}},
    401: {"description": "no token, or a wrong one"},
    429: {"description": "too many images wait; Retry-After says how many seconds"},
}
router = APIRouter()


class Guard:
    """ASGI middleware: who may ask, how much may be sent, how slowly; and what is counted."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, path = time.perf_counter(), scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and path == "/images":
                self.service.requests.labels(message["status"]).inc()
                self.service.seconds.observe(time.perf_counter() - begun)
            await send(message)

        try:
            body = await self._body(Request(scope, receive))
        except ClientDisconnect:
            return
        except HTTPException as error:
            detail = {"detail": error.detail}
            answer = JSONResponse(detail, error.status_code, {"Connection": "close"})
            await answer(scope, receive, counted)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, again, counted)

    async def _body(self, request: Request) -> bytes:
        """A request's body. HTTPException for one that is refused, ClientDisconnect."""
        token, path, body = self.service.options.token, request.scope["path"], b""
        if token and path not in OPEN and not path.startswith("/docs/"):
            said = dict(request.scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(said, f"Bearer {token}".encode()):
                raise HTTPException(401, "expected the header Authorization: Bearer TOKEN")
        try:
            async with asyncio.timeout(PATIENCE):
                async for part in request.stream():
                    body += part
                    if len(body) > MOST_BYTES:
                        raise HTTPException(413, f"a request may have {MOST_BYTES} bytes")
        except TimeoutError:
            words = f"the request did not come within {PATIENCE:.0f} s"
            raise HTTPException(408, words) from None
        return body


def application(service: Service) -> FastAPI:
    """The service as an ASGI application."""

    @asynccontextmanager
    async def batching(_: FastAPI) -> AsyncGenerator[None]:
        work = asyncio.create_task(service.batcher.run())
        yield
        work.cancel()

    app = FastAPI(title="fewstep", version="1", lifespan=batching, docs_url=None, redoc_url=None)
    for kind in (UserError, Full):
        app.add_exception_handler(kind, refused)
    app.state.service = service
    app.include_router(router)
    with suppress(ImportError):
        from swagger_ui_bundle import swagger_ui_path

        app.mount("/docs/files", StaticFiles(directory=swagger_ui_path))
        app.add_api_route("/docs", interface, include_in_schema=False)
    app.add_middleware(Guard, service=service)
    return app


async def refused(_: Request, error: Exception) -> Response:
    """The answer where images cannot be made, or not now."""
    full = isinstance(error, Full)
    headers = {"Retry-After": f"{error.seconds:.0f}"} if full else None
    return JSONResponse({"detail": str(error)}, 429 if full else 422, headers)


@router.post("/images", response_class=Response, responses=RESPONSES)
async def images(asked: Asked, request: Request) -> Response:
    """Make images: image i of a seed is always the same one."""
    work = asyncio.ensure_future(request.app.state.service.images(asked))
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


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/model")
async def model(request: Request) -> Described:
    """What the service makes images with, and what it may be asked for."""
    return request.app.state.service.described()


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether it answers, and how many images wait."""
    return {"status": "ok", "waiting": request.app.state.service.batcher.waiting}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    registry = request.app.state.service.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def gallery() -> str:
    return PAGE.read_text()


async def interface() -> HTMLResponse:
    """The page of the interface, whose files are on this machine: it needs no network."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="fewstep",
        swagger_js_url="/docs/files/swagger-ui-bundle.js",
        swagger_css_url="/docs/files/swagger-ui.css",
        swagger_favicon_url="/docs/files/favicon-32x32.png",
    )
