"""The page's server: a process of its own, started by `pbrl.labelling.service` and ended with the process that did.

It reads its settings as one line of JSON from its standard input, answers with one line when the page can be opened,
and then takes lines about what training does; when its input ends, it ends. The token comes this way, so that no list
of processes, log or file holds it.

Every request but those for the page itself carries the token in a header; the page has it from its address behind the
`#`, which browsers keep to themselves.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, TextIO
from urllib.parse import urlsplit

from pbrl.labelling import drawing
from pbrl.labelling.store import LabelStore, Refused, Shown

BODY, BODY_SECONDS = 4096, 5.0  # size of a request's body, and time for it to arrive
RATE, BURST = 100.0, 200.0  # requests a second, and at once
CONNECTIONS = 100  # at the same time
WAITING, WAITING_SECONDS = 50, 10.0  # connections without a whole request, and how long each may be one
CLIPS_KEPT = 64  # drawn clips in memory
AHEAD = 4  # questions drawn before they are shown
LINGER = 3.0  # seconds for which a finished run's page can still say so
ENDED = ("finished", "labelled")  # phases after which no answer is used
LABELS = (1.0, 0.5, 0.0, None)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src blob:; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


class Bucket:
    """So many requests a second, so many at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.left, self.at = rate, burst, burst, time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.at) * self.rate)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Clips:
    """Draws questions in the drawing process, one at a time, and keeps the last ones."""

    def __init__(self, store: LabelStore, env: dict[str, Any], size: int, yields: bool) -> None:
        self.store, self.size = store, size
        self.drawing = drawing.Process(env, size, yields)
        self.thread = ThreadPoolExecutor(1)  # waits for the drawing process
        self.kept: OrderedDict[Any, asyncio.Future[bytes]] = OrderedDict()
        self.latest: tuple[int, bytes] | None = None  # the robot's last steps, by number

    def _draw(self, key: Any, clips: bytes, swapped: bool) -> asyncio.Future[bytes]:
        known = self.kept.get(key)
        if known is None or known.cancelled() or (known.done() and known.exception()):
            known = asyncio.get_running_loop().run_in_executor(self.thread, self.drawing.film, clips, swapped)
            known.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio prints it
            self.kept[key] = known
        self.kept.move_to_end(key)
        while len(self.kept) > CLIPS_KEPT:
            self.kept.popitem(last=False)[1].cancel()
        return known

    async def question(self, shown: Shown) -> bytes | None:
        """The mp4 of a question."""
        clips = await asyncio.to_thread(self.store.clips, shown.question)
        if clips is None:
            return None
        return await asyncio.shield(self._draw((shown.question, shown.repeat), clips, shown.repeat))

    async def ahead(self) -> None:
        """Begin to draw what will be asked next."""
        for number in await asyncio.to_thread(self.store.waiting, AHEAD):
            if (number, False) not in self.kept:
                clips = await asyncio.to_thread(self.store.clips, number)
                if clips is not None:
                    self._draw((number, False), clips, False)

    async def robot(self) -> bytes | None:
        """The mp4 of the robot's last steps."""
        if self.latest is None:
            return None
        number, clips = self.latest
        return await asyncio.shield(self._draw(("robot", number), clips, False))


class Labelling:
    """The application: what a request may ask, and what it gets."""

    def __init__(self, settings: dict[str, Any], store: LabelStore, clips: Clips, hosts: set[str] | None) -> None:
        self.settings, self.store, self.clips, self.hosts = settings, store, clips, hosts
        self.token = settings["token"].encode()
        self.known, self.strangers = Bucket(RATE, BURST), Bucket(RATE, BURST)  # with the token, and without
        self.step_seconds: float | None = None
        self.status: dict[str, Any] = {"phase": "starting"}
        self.curve: dict[int, dict[str, Any]] = {}
        self.files = {
            path: (resources.files("pbrl.labelling").joinpath("page", name).read_bytes(), kind)
            for path, (name, kind) in PAGE.items()
        }

    # what training says

    def hear(self, line: dict[str, Any]) -> None:
        """One line from training: `status` (its latest values), `point` (of the curve), `robot` (its last steps)."""
        if "status" in line:
            self.status = {**self.status, **line["status"]}
        if "point" in line:
            self.curve[line["point"]["step"]] = line["point"]
        if "robot" in line:
            number = self.clips.latest[0] + 1 if self.clips.latest else int(time.time())
            self.clips.latest = (number, bytes.fromhex(line["robot"]))

    # what the page asks

    def state(self, rater: str) -> dict[str, Any]:
        """Everything that the page shows."""
        ended = self.status["phase"] in ENDED
        shown = None if ended else self.store.next(rater)
        real, lasts = drawing.timing(self.settings["steps"], self.step_seconds)
        return {
            "task": self.settings["task"],
            "rater": rater,
            "question": None if shown is None else {"number": shown.question, "repeat": shown.repeat},
            "undo": None if ended else self.store.last(rater),
            **self.store.progress(rater),
            "reviews": self.store.reviews,
            "wait": self.settings["wait"],
            "segment": {"steps": self.settings["steps"], "seconds": real, "lasts": lasts},
            "you": self.store.raters().get(rater, {}),
            "training": {**self.status, "robot": self.clips.latest[0] if self.clips.latest else None},
            "curve": [self.curve[step] for step in sorted(self.curve)][-200:],
        }

    def act(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says and return the state after it. A refused answer changes nothing and says why."""
        rater, refused = _text(body, "rater"), None
        try:
            if name == "answer":
                shown = Shown(_whole(body, "number"), _flag(body, "repeat"))
                self.store.answer(_text(body, "answer"), rater, shown, _label(body), _seconds(body))
            elif name == "undo":
                self.store.undo(rater, _text(body, "answer"))
        except Refused as reason:
            refused = str(reason)
        return {**self.state(rater), "refused": refused}

    # ------------------------------------------------------------------------------------------------ requests

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application. Nothing of a request is ever used as a path or printed."""
        from starlette.requests import Request
        from starlette.responses import JSONResponse, PlainTextResponse, Response

        if scope["type"] == "lifespan":
            return
        if scope["type"] != "http":  # the server speaks nothing else; a web socket is closed
            await send({"type": "websocket.close", "code": 1003})
            return
        request = Request(scope, receive)
        try:
            content = await self._respond(request)
            response: Response = (
                JSONResponse(content) if isinstance(content, dict) else Response(content[0], media_type=content[1])
            )
        except Denied as denied:
            response = PlainTextResponse(f"{denied}\n", denied.status)
            response.headers["Connection"] = "close"  # what is left of its body is not read
        except (OSError, RuntimeError, ValueError) as error:
            print(f"the labelling page could not answer: {error}".split("\n")[0], file=sys.stderr)
            response = PlainTextResponse(f"{error}\n", 500)
        response.headers.update(HEADERS)
        await response(scope, receive, send)

    async def _respond(self, request: Any) -> Any:
        self._check_origin(request)
        path = request.scope["path"]
        if request.method == "GET" and path in self.files:  # a link to it may stand on any page
            return self.files[path]
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Denied(403, "asked by a foreign page")
        given = request.headers.get("authorization", "").encode()
        known = hmac.compare_digest(given, b"Bearer " + self.token)
        if not (self.known if known else self.strangers).take():
            raise Denied(429, "too many requests")
        if not known:
            raise Denied(403, "wrong token: open the link that the run printed")
        if request.method == "POST" and path in ("/api/state", "/api/answer", "/api/undo"):
            body = await _body(request)
            state = await asyncio.to_thread(self._act, path.rpartition("/")[2], body)
            if self.settings["draw"]:
                await self.clips.ahead()
            return state
        if request.method == "GET" and path == "/api/clip":
            number, repeat = request.query_params.get("number", ""), request.query_params.get("repeat") == "true"
            if not (number.isascii() and number.isdigit() and len(number) < 12):
                raise Denied(400, "number is not one")
            return _mp4(await self.clips.question(Shown(int(number), repeat)))
        if request.method == "GET" and path == "/api/robot":
            return _mp4(await self.clips.robot())
        raise Denied(404, "there is nothing here")

    def _act(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.act(name, body)
        except Refused as reason:  # the name of the rater
            raise Denied(400, str(reason)) from None

    def _check_origin(self, request: Any) -> None:
        """Only pages of this very server may ask, under a name that is its own (no DNS rebinding, no other site)."""
        host = request.headers.get("host", "")
        if not self._own(host):
            raise Denied(421, "unknown Host: use the link that the run printed")
        origin = request.headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Denied(403, "foreign Origin")

    def _own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if self.hosts is not None:
            return host.lower() in self.hosts
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
        return True


class Denied(Exception):
    """A request that is refused, in a line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _mp4(content: bytes | None) -> tuple[bytes, str]:
    if content is None:
        raise Denied(404, "there is no such clip")
    return content, "video/mp4"


async def _body(request: Any) -> dict[str, Any]:
    """The request's JSON table, of bounded size."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Denied(415, "expected application/json")
    try:
        body = json.loads(await asyncio.wait_for(_content(request), BODY_SECONDS))
    except asyncio.TimeoutError:
        raise Denied(408, "the body takes too long") from None
    except (ValueError, RecursionError):
        raise Denied(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Denied(400, "the body is not a table")
    return body


async def _content(request: Any) -> bytes:
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > BODY:
            raise Denied(413, f"a request has at most {BODY} bytes")
    return content


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not 1 <= len(value) <= 64 or not value.isprintable():
        raise Denied(400, f"{key} is not a short text")
    return value


def _whole(body: dict[str, Any], key: str) -> int:
    value = body.get(key)
    if type(value) is not int or not 0 <= value < 2**53:
        raise Denied(400, f"{key} is not a number of a pair")
    return value


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if not isinstance(value, bool):
        raise Denied(400, f"{key} is neither true nor false")
    return value


def _label(body: dict[str, Any]) -> float | None:
    value: Any = body.get("label", "")
    if isinstance(value, bool) or value not in LABELS:
        raise Denied(400, "label is none of 1, 0.5, 0 and null")
    return None if value is None else float(value)


def _seconds(body: dict[str, Any]) -> float:
    value: Any = body.get("seconds")
    if type(value) not in (int, float) or not abs(value) < 1e9:  # NaN is refused too
        raise Denied(400, "seconds is not a number")
    return float(value)


# ---------------------------------------------------------------------------------------------------- the process


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one.

    Raises:
        ValueError: if there is none to be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"host={host} port={port}: {error.strerror or error}; expected an address of this machine (localhost, "
            "0.0.0.0) and a port that nobody uses, or 0: any free one"
        ) from error
    return bound


def own_hosts(host: str, port: int) -> set[str] | None:
    """Values of the Host header that are this server's; None: it listens to the network, see `Labelling._own`."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return {f"{name}:{port}" for name in ("localhost", "127.0.0.1", "[::1]", host)} if loopback else None


def web_server(app: Labelling) -> Any:
    """uvicorn's server; connections that send no whole request are given up, the oldest first when they are many."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        since = 0.0  # when this connection began to wait for a request

        @property
        def waits(self) -> bool:
            return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()
            waiting = [other for other in self.connections if isinstance(other, Patient) and other.waits]
            if len(waiting) > WAITING:
                min(waiting, key=lambda other: other.since).transport.close()

        def on_response_complete(self) -> None:
            self._wait()
            super().on_response_complete()

        def _wait(self) -> None:
            self.since = time.monotonic()
            self.loop.call_later(WAITING_SECONDS, self._end, self.since)

        def _end(self, since: float) -> None:
            if self.waits and self.since == since:
                self.transport.close()

    config = uvicorn.Config(
        app,
        http=Patient,
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
        server_header=False,
        ws="none",
        proxy_headers=False,
    )
    return uvicorn.Server(config)


def main() -> None:
    """Serve until the standard input ends."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an environment prints in the drawing process is no answer, and nobody reads on
    settings = json.loads(sys.stdin.readline())
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # malformed requests are no news
    try:
        store = LabelStore(settings["path"], settings["reviews"], settings["lease"], settings["repeats"])
        clips = Clips(store, settings["env"], settings["size"], yields=not settings["wait"])
        bound = bind(settings["host"], settings["port"])
        port = bound.getsockname()[1]
        app = Labelling(settings, store, clips, own_hosts(settings["host"], port))
        if settings["draw"]:
            app.step_seconds = clips.drawing.start()
    except (OSError, ValueError, RuntimeError) as error:
        _say(answer, {"error": str(error).split("\n")[0]})
        return
    server = web_server(app)
    threading.Thread(target=_listen, args=(app, server), daemon=True).start()
    _say(answer, {"port": port})
    server.run(sockets=[bound])
    clips.drawing.stop()
    os._exit(0)  # without waiting for a clip that nobody will see


def _listen(app: Labelling, server: Any) -> None:
    """Take what training says until it ends, then end the server."""
    for line in sys.stdin:
        app.hear(json.loads(line))
    if app.status["phase"] in ENDED:
        time.sleep(LINGER)
    server.should_exit = True


def _say(answer: TextIO, line: dict[str, Any]) -> None:
    try:
        print(json.dumps(line), file=answer, flush=True)
    except BrokenPipeError:  # who started it was killed: its input has ended too
        os._exit(1)


if __name__ == "__main__":
    main()
