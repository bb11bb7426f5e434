"""A teacher somewhere else: segments are posted as JSON, answers are read from the reply. The door for VLM judges.

Request (POST, application/json); obs and actions are lists [H][dim], frames base64 PNG files in order of time:

    {"id": "<SHA-256 of the pairs>",
     "pairs": [{"first": {"obs": …, "actions": …, "frames": […]}, "second": {…}}, …]}

Reply (200), one answer per pair: 1 first, 0 second, 0.5 equally good (or anything between), null to skip:

    {"answers": [1, 0, 0.5, null]}

Equal pairs make equal ids, so a server can answer a repeated request from memory. Task rewards are never sent.
With PBRL_TEACHER_TOKEN=… in the environment each request has the header `Authorization: Bearer …`.
`python -m teachers.example_server` is a server to start from.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import logging
import math
import os
import queue
import re
import reprlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from pbrl.files import printable
from pbrl.types import Query, Segments, Teacher

log = logging.getLogger(__name__)

HEADER_BYTES = 65_536  # of all of a reply's headers
TOKEN = "PBRL_TEACHER_TOKEN"  # environment variable: sent as `Authorization: Bearer …`, and stored nowhere

# state float64 [S], actions float32 [H, act_dim], numbers of steps taken, ascending in [0, H] -> as many pictures
Render = Callable[[np.ndarray, np.ndarray, Sequence[int]], list[np.ndarray]]  # uint8 [height, width, 3] each


class HTTPTeacherError(RuntimeError):
    """The server could not be reached, refused, or answered something that is not an answer."""


class Renderer:
    """Shows a segment again by stepping an environment of its own from the stored simulator state.

    Args:
        env: has `set_state(state)`, `step(action)` and `render() -> uint8 [height, width, 3]`; not the one that trains.
    """

    def __init__(self, env: Any) -> None:
        self.env = env

    def __call__(self, state: np.ndarray, actions: np.ndarray, moments: Sequence[int]) -> list[np.ndarray]:
        """Pictures taken after these numbers of steps, ascending in [0, H]."""
        self.env.set_state(state)
        taken, pictures = 0, []
        for moment in moments:
            for action in actions[taken:moment]:
                self.env.step(action)
            taken = moment
            pictures.append(self.env.render())
        return pictures


class HTTPTeacher(Teacher):
    """Asks a server. Slow, missing and failing (5xx, 429) servers are retried with growing pauses.

    A query is sent in parts, and what is answered is yielded at once: `pbrl.asking.ask` writes it down before the next
    part is sent, so that neither a kill nor a server that dies in the middle loses it.

    Args:
        url: where to post, http or https; a password is no part of it, see `TOKEN`.
        timeout: seconds for one reply, start to end.
        retries: attempts after the first.
        backoff: seconds before the first retry; doubled at each further one, up to a minute.
        pairs_per_request: pairs in one request.
        frames: pictures to send per segment, evenly spaced in time, the last moment included; 0 sends none.
        render: takes the pictures, a `Renderer` for instance; needed if frames > 0.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 30.0,
        retries: int = 5,
        backoff: float = 1.0,
        pairs_per_request: int = 10,
        frames: int = 0,
        render: Render | None = None,
    ) -> None:
        target = urlsplit(url)
        if target.scheme not in ("http", "https") or not target.hostname:
            raise ValueError(f"url is {url!r}; expected http://HOST:PORT/PATH or https://…")
        if "@" in target.netloc:
            raise ValueError(
                f"url is …@{target.hostname}…; expected no password in it, which would be stored: set {TOKEN}"
            )
        if not re.fullmatch(r"[!-~]+", url):
            raise ValueError(
                f"url is {url!r}; expected no spaces and no letters beyond ASCII: percent-encode them (%20)"
            )
        if not re.fullmatch(r"[!-~]*", os.environ.get(TOKEN, "")):
            raise ValueError(f"{TOKEN} has spaces, line ends or letters beyond ASCII; expected a token without them")
        if frames and render is None:
            raise ValueError(f"frames={frames}; expected 0, or a renderer as teacher=http-frames has one")
        if timeout <= 0 or retries < 0 or backoff < 0 or pairs_per_request < 1 or frames < 0:
            raise ValueError(
                f"timeout={timeout}, retries={retries}, backoff={backoff}, pairs_per_request={pairs_per_request}, "
                f"frames={frames}: expected a positive timeout, at least one pair per request and no negative number"
            )
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.pairs_per_request, self.frames, self.render = pairs_per_request, frames, render
        self.needs_states = frames > 0
        self._retried = 0

    def __call__(self, query: Query) -> Iterator[float | None]:
        """The server's answers, pair by pair; None: skipped.

        Raises:
            HTTPTeacherError: naming the url and, for a malformed answer, the pair and the value.
        """
        self._retried = 0
        try:
            for start in range(0, len(query), self.pairs_per_request):
                part = self._ask(query[start : start + self.pairs_per_request], start)
                for number, label in enumerate(part, 1):
                    self.at_hand = number < len(part)
                    yield label
        finally:
            self.at_hand = False

    def metrics(self) -> dict[str, float]:
        """`teacher/http_retries`: attempts repeated during the last query."""
        return {"teacher/http_retries": float(self._retried)}

    def _ask(self, query: Query, start: int) -> list[float | None]:
        """The answers to one part, whose first pair is the `start`-th of the whole query."""
        pairs = self._pairs(query)
        name = hashlib.sha256(pairs.encode()).hexdigest()
        reply = self._post(f'{{"id": "{name}", "pairs": {pairs}}}'.encode(), limit=4096 + 64 * len(query))
        return self._answers(reply, len(query), start)

    def _pairs(self, query: Query) -> str:
        """The pairs as JSON."""
        sides = [self._side(query, side) for side in (0, 1)]
        pairs = [{"first": first, "second": second} for first, second in zip(*sides, strict=True)]
        return json.dumps(pairs, allow_nan=False)

    def _side(self, query: Query, side: int) -> list[dict[str, Any]]:
        segments: Segments = (query.first, query.second)[side]
        shown = [
            {"obs": obs, "actions": actions}
            for obs, actions in zip(segments.obs.tolist(), segments.actions.tolist(), strict=True)
        ]
        if self.frames:
            if self.render is None or query.states is None:
                raise HTTPTeacherError(f"frames={self.frames} needs pairs whose simulator states are known")
            moments = np.unique(np.linspace(segments.length, 0, self.frames).round().astype(int)).tolist()
            for segment, state, actions in zip(shown, query.states[:, side], segments.actions, strict=True):
                pictures = self.render(state.numpy(), actions.numpy(), moments)
                segment["frames"] = [_png(picture) for picture in pictures]
        return shown

    def _post(self, body: bytes, limit: int) -> bytes:
        """The reply's body, of at most `limit` bytes."""
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self._pause(attempt, problem)
            request = urllib.request.Request(self.url, body, headers, method="POST")  # a proxy's handler changes it
            try:
                return self._exchange(request, limit)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {printable(error.reason)}"
                error.close()
                if error.code < 500 and error.code != 429:
                    raise HTTPTeacherError(f"{self.url} refused the request: {problem}") from error
            except (OSError, http.client.HTTPException) as error:  # no connection, time-out, broken reply
                problem = printable(getattr(error, "reason", None) or error or type(error).__name__)
        raise HTTPTeacherError(
            f"no answer from {self.url} after {self.retries + 1} attempts: {problem}. What was answered is kept: start "
            "the server again and go on with resume=RUN (the run's directory)"
        )

    def _pause(self, attempt: int, problem: str) -> None:
        seconds = min(self.backoff * 2.0 ** min(attempt - 1, 1000), 60.0)  # 2.0 ** 1024 overflows
        log.warning("%s: %s; trying again in %g s (%d of %d)", self.url, problem, seconds, attempt, self.retries)
        time.sleep(seconds)
        self._retried += 1

    def _exchange(self, request: urllib.request.Request, limit: int) -> bytes:
        """The reply's body, or a TimeoutError after `timeout` seconds whatever the network does meanwhile.

        A socket's own time-out starts anew with each byte, and a name look-up has none: so another thread does all
        this, and its connections are shut when the time is over.
        """
        end = time.monotonic() + self.timeout
        sockets: list[socket.socket] = []
        outcome: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

        def exchange() -> None:
            try:
                with _opener(self.url, sockets, limit).open(request, timeout=2 * self.timeout) as response:
                    outcome.put(_read_body(response, limit, self.url))
            except BaseException as error:  # raised below, in the caller's thread
                outcome.put(error)

        threading.Thread(target=exchange, daemon=True).start()
        try:
            found = outcome.get(timeout=max(end - time.monotonic(), 0.0))
        except queue.Empty:
            raise TimeoutError(f"no whole reply within {self.timeout:g} s") from None
        finally:  # Ctrl-C too
            for connection in sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        if isinstance(found, BaseException):
            raise found
        return found

    def _answers(self, reply: bytes, size: int, start: int) -> list[float | None]:
        try:
            parsed = json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise HTTPTeacherError(f"{self.url} sent {reprlib.repr(reply)}, which is not JSON: {error}") from error
        if not isinstance(parsed, dict) or not isinstance(parsed.get("answers"), list):
            raise HTTPTeacherError(f'{self.url} sent {reprlib.repr(parsed)}; expected {{"answers": [...]}}')
        answers = parsed["answers"]
        if len(answers) != size:
            raise HTTPTeacherError(f"{self.url} sent {len(answers)} answers to {size} pairs")
        for pair, answer in enumerate(answers, start):
            if answer is not None and not _is_label(answer):
                raise HTTPTeacherError(
                    f"{self.url} answered pair {pair} with {reprlib.repr(answer)}; expected a number in [0, 1] "
                    "(1 first, 0 second, 0.5 equally good) or null to skip it"
                )
        return [None if answer is None else float(answer) for answer in answers]


def _is_label(answer: Any) -> bool:
    return type(answer) in (int, float) and not math.isnan(answer) and 0 <= answer <= 1


def _read_body(response: Any, limit: int, url: str) -> bytes:
    body = b""
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > limit:
            raise HTTPTeacherError(f"{url} sent a reply of more than {limit} bytes; expected only answers")
    if response.length:
        raise http.client.IncompleteRead(body, response.length)
    return body


class _Bounded(io.RawIOBase):
    """What a connection receives, up to `limit` bytes: status lines and headers count, those of `100 Continue` too."""

    def __init__(self, raw: Any, limit: int) -> None:
        self._raw, self._left, self._limit = raw, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        received: int | None = self._raw.readinto(buffer)
        self._left -= received or 0
        if self._left < 0:
            raise HTTPTeacherError(f"the server sent more than {self._limit} bytes; expected only answers")
        return received

    def close(self) -> None:
        self._raw.close()
        super().close()


def _opener(url: str, sockets: list[socket.socket], limit: int) -> urllib.request.OpenerDirector:
    """Speaks http and https and nothing else; does not follow redirects, which would turn the POST into a GET.

    Its connections are added to `sockets`; each receives at most `limit` bytes of body and HEADER_BYTES of headers.
    """

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
            super().__init__(sock, *args, **options)
            self.fp.close()
            self.fp = io.BufferedReader(_Bounded(sock.makefile("rb", buffering=0), HEADER_BYTES + limit))

    class Connection(http.client.HTTPConnection):
        response_class = Response

        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class SecureConnection(http.client.HTTPSConnection):
        response_class = Response

        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Connection, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(SecureConnection, request, context=self._context)  # type: ignore[attr-defined]

    target = urlsplit(url)
    local = target.hostname in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({} if local else None),  # a proxy cannot see this machine's own server
        Handler(),
        SecureHandler() if target.scheme == "https" else None,  # it reads all the certificates there are
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        if handler is not None:
            opener.add_handler(handler)
    return opener


def _png(picture: np.ndarray) -> str:
    """A base64 PNG file of a uint8 [height, width, 3] picture."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()
