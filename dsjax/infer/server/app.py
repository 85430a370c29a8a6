"""The HTTP interface: OpenAI's, what vLLM adds to it, and the page at /.

app = create_app(service); uvicorn.run(app, host="127.0.0.1", port=8000)
"""

import asyncio
import contextlib
import hmac
import importlib.resources
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from dsjax.config import ConfigError
from dsjax.infer.server import chat, completions
from dsjax.infer.server.driver import Closing, Full
from dsjax.infer.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    TokenizeRequest,
)
from dsjax.infer.server.service import Failed, Service

_RETRY_AFTER_S = 5
_GRACE_S = 5  # beyond a request's time, for its end to be read
_PAGE = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


_WRONG = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be answered"},
    "5XX": {"model": ErrorAnswer, "description": "The server could not answer"},
}
_PIECES = {200: {"content": {"text/event-stream": {}}, "description": "The answer, or with `stream` its pieces"}}


class Limits:
    """ASGI middleware: a body is read here, no more of it and no longer than may be."""

    def __init__(self, app, most: int, seconds: float):
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, message = bytearray(), {"more_body": not declared.isdigit() or int(declared) <= self.most}
        large = not message["more_body"]
        try:
            async with asyncio.timeout(self.seconds):
                while message.get("more_body") and not large:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    large = len(body) > self.most
        except TimeoutError:
            return await _last(408, f"the body did not come in {self.seconds:g} s")(scope, receive, send)
        if large:
            return await _last(413, f"the body is larger than {self.most:,} bytes")(scope, receive, send)
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay():
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


def create_app(service: Service, version: str = "") -> FastAPI:
    """The application of one model. Its engine's thread runs from start to end of the server."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        service.driver.start()
        yield
        await service.driver.drain(service.config.drain_s)
        await asyncio.to_thread(service.driver.close)

    app = FastAPI(
        title="dsjax", version=version or "0", lifespan=lifespan, docs_url=None, redoc_url=None, responses=_WRONG
    )
    most, seconds = int(service.config.max_body_mib * (1 << 20)), service.config.body_timeout_s
    app.add_middleware(Limits, most=most, seconds=seconds)
    _errors(app)

    async def allowed(request: Request) -> None:
        if service.config.api_key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {service.config.api_key}".encode()):
            raise HTTPException(401, "no key, or a wrong one; expected `Authorization: Bearer KEY`")

    def known(model: str | None) -> None:
        if model is not None and model != service.name:
            raise HTTPException(404, f"model {model!r} is not here; there is {service.name!r}")

    guarded = [Depends(HTTPBearer(auto_error=False)), Depends(allowed)]

    @app.post("/v1/completions", dependencies=guarded, responses=_PIECES)
    async def complete(body: CompletionRequest, request: Request):
        known(body.model)
        return await _answer(service, request, body, completions.whole, completions.stream)

    @app.post("/v1/chat/completions", dependencies=guarded, responses=_PIECES)
    async def converse(body: ChatRequest, request: Request):
        known(body.model)
        return await _answer(service, request, body, chat.whole, chat.stream)

    @app.get("/v1/models", dependencies=guarded)
    async def models():
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str):
        known(name)
        return _model(service)

    @app.post("/tokenize", dependencies=guarded)
    async def tokenize(body: TokenizeRequest):
        known(body.model)
        if body.messages is not None:
            tokens = chat.prompt_of(service, body.messages, add_generation_prompt=body.add_generation_prompt)
        elif body.add_special_tokens:
            tokens = service.encode(body.prompt)
        else:
            tokens = service.tokenizer.encode_rendered(body.prompt)
        result = {"count": len(tokens), "max_model_len": service.driver.engine.longest, "tokens": tokens}
        if body.return_token_strs:
            result["token_strs"] = [service.tokenizer.decode([t], skip_special=False) for t in tokens]
        return result

    @app.post("/detokenize", dependencies=guarded)
    async def detokenize(body: DetokenizeRequest):
        known(body.model)
        most = service.loaded.config.model.vocab_size
        if bad := [t for t in body.tokens if t >= most]:
            raise ConfigError(f"tokens: {bad[0]}; expected below {most}")
        return {"prompt": service.tokenizer.decode(body.tokens, skip_special=False)}

    @app.get("/tokenizer_info", dependencies=guarded)
    async def tokenizer_info():
        t = service.tokenizer
        strings = {f"{name}_token": t.decode([id], skip_special=False) for name, id in t.special_ids.items()}
        source = service.template and service.template.source
        return {"tokenizer_class": t.kind, "vocab_size": t.vocab_size, "chat_template": source, **strings}

    @app.get("/", include_in_schema=False)
    @app.get("/page.{kind}", include_in_schema=False)
    async def page(kind: str = "html"):
        if kind not in _PAGE:
            raise HTTPException(404, "Not Found")
        text = importlib.resources.files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8")
        return Response(text, media_type=_PAGE[kind], headers=_PAGE_HEADERS)

    @app.get("/about", include_in_schema=False)
    async def about():
        experts = service.loaded.config.model.n_routed_experts
        return {"model": service.name, "n_routed_experts": experts, "chat": service.template is not None}

    @app.get("/metrics", dependencies=guarded, include_in_schema=False)
    async def metrics():
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/health")
    async def health():
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "Not now"}})
    async def ready():
        """Requests are taken, and steps go forward."""
        good = service.driver.ready
        return JSONResponse({"status": "ready" if good else "not ready"}, 200 if good else 503)

    return app


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "dsjax",
        "max_model_len": service.driver.engine.longest,
    }


async def _answer(service: Service, request: Request, body, whole: Callable, stream: Callable):
    """The whole answer, or its pieces as server-sent events. Who goes away, or takes too long, ends the request."""
    service.driver.check()
    seconds = service.config.timeout_s
    if not body.stream:
        return JSONResponse(await _while_connected(request, whole(service, body), seconds))
    end = time.monotonic() + seconds
    pieces = stream(service, body)  # what is wrong with a request shows before the status is sent
    first = await _while_connected(request, anext(pieces), seconds)

    async def events() -> AsyncGenerator[str]:
        try:
            yield _event(first)
            while True:
                async with asyncio.timeout(max(0, end - time.monotonic())):
                    piece = await anext(pieces)
                yield _event(piece)
        except StopAsyncIteration:
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield _event(_envelope(504, f"not done in {seconds:g} s"))
        except Failed as error:
            yield _event(_envelope(500, str(error)))

    return _Stream(events(), pieces, end + _GRACE_S)


class _Stream(StreamingResponse):
    """Events to a client that reads them before the time is over; then the connection is cut."""

    def __init__(self, events: AsyncGenerator[str], pieces: AsyncGenerator, end: float):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._pieces, self._end = events, pieces, end

    async def __call__(self, scope, receive, send) -> None:
        # Who goes away while a piece is sent leaves both where they are: the request would run until they are found.
        async with contextlib.aclosing(self._pieces), contextlib.aclosing(self._events):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._end - time.monotonic()):
                    await super().__call__(scope, receive, send)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _while_connected(request: Request, answer: Awaitable, seconds: float) -> Any:
    task = asyncio.ensure_future(answer)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HTTPException(*((499, "the client went away") if watch.done() else (504, f"not done in {seconds:g} s")))
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


# Errors

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def _envelope(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(_RETRY_AFTER_S)}}.get(status)
    return JSONResponse(_envelope(status, message, param), status, headers=headers)


def _last(status: int, message: str) -> JSONResponse:
    """An error after which nothing more is read of the connection."""
    return JSONResponse(_envelope(status, message), status, headers={"Connection": "close"})


def _errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where or 'body'}: {first['msg']}", where or None)

    @app.exception_handler(ConfigError)
    async def refused(request: Request, error: ConfigError):
        return _error(400, str(error))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException):
        answer = _error(error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Full)
    async def full(request: Request, error: Full):
        return _error(429, "too many requests wait; try again")

    @app.exception_handler(Closing)
    async def closing(request: Request, error: Closing):
        return _error(503, "the server is ending")

    @app.exception_handler(RecursionError)
    async def deep(request: Request, error: RecursionError):
        return _error(400, "the body is nested too deep")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception):
        return _error(500, str(error) if isinstance(error, Failed) else f"{type(error).__name__}")
