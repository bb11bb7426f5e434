"""The remote teacher against real servers on this machine, well-behaved and not."""

import base64
import contextlib
import io
import itertools
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from envs.pointmass import PointMass
from pbrl.asking import AnswerJournal, TeacherError, ask
from pbrl.interfaces import PlainEnvironment
from pbrl.launch.configuration import ConfigError
from pbrl.launch.one_run import Interrupts
from pbrl.types import Query, Segments
from teachers import example_server as example
from teachers.http import TOKEN, HTTPTeacher, HTTPTeacherError
from tests.conftest import tiny_loop

REWARD = 987.125  # a task reward that must not appear in any request


def query(size: int, states: bool = False) -> Query:
    """Pairs whose first segments spend i / 10 a step and whose second 0.25."""
    spent = torch.arange(size).reshape(size, 1, 1).expand(-1, 3, 2) / 10.0
    obs = torch.randn(size, 3, 4, generator=torch.Generator().manual_seed(size))
    return Query(
        Segments(obs, spent.contiguous()),
        Segments(-obs, torch.full((size, 3, 2), 0.25)),
        torch.full((size, 2, 3), REWARD),
        mean_task_reward=REWARD,
        states=torch.arange(size * 2.0).double().reshape(size, 2, 1) if states else None,
    )


class Server:
    """A server that replies with what `reply(request number, body)` writes to the raw connection."""

    def __init__(self, reply: Callable[[int, Any, BaseHTTPRequestHandler], None]) -> None:
        self.requests: list[Any] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                reply(len(requests), requests[-1], self)

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None:
                """A client that gave up on a slow reply is expected here."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/label"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Server":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def answers(*values: Any) -> bytes:
    return json.dumps({"answers": values}).encode()


def always(body: bytes, status: int = 200) -> Server:
    return Server(lambda number, request, handler: send(handler, body, status))


def teacher(server: Server, **options: Any) -> HTTPTeacher:
    return HTTPTeacher(server.url, **{"timeout": 5.0, "retries": 2, "backoff": 0.01} | options)


def labels(asked: HTTPTeacher, pairs: Query) -> list[float | None]:
    return list(asked(pairs))


# When all is well


def test_answers_are_read_and_null_skips() -> None:
    with always(answers(1, 0, 0.5, None, 0.25)) as server:
        assert labels(teacher(server), query(5)) == [1, 0, 0.5, None, 0.25]


def test_the_request_holds_the_segments_an_id_and_no_task_reward() -> None:
    asked = query(2)
    with always(answers(1, 1)) as server:
        labels(teacher(server), asked)
        labels(teacher(server), asked)
        labels(teacher(server), query(2, states=True)[[1, 0]])
    same, again, other = server.requests
    assert same.keys() == {"id", "pairs"} and same["pairs"][1].keys() == {"first", "second"}
    assert same["pairs"][1]["first"].keys() == {"obs", "actions"}
    assert torch.equal(torch.tensor(same["pairs"][1]["second"]["obs"]), asked.second.obs[1])
    assert torch.equal(torch.tensor(same["pairs"][1]["first"]["actions"]), asked.first.actions[1])
    assert same["id"] == again["id"] != other["id"]
    assert str(REWARD) not in json.dumps(server.requests)


def test_a_long_query_is_sent_in_parts() -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        send(handler, answers(*[number / 10] * len(request["pairs"])))

    with Server(reply) as server:
        assert labels(teacher(server, pairs_per_request=2), query(5)) == [0.1, 0.1, 0.2, 0.2, 0.3]


def test_an_empty_query_asks_nobody() -> None:
    assert labels(HTTPTeacher("http://127.0.0.1:1/"), query(0)) == []


def pictures(request: Any, pair: int, side: str) -> list[np.ndarray]:
    files = request["pairs"][pair][side]["frames"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]


def test_pictures_are_sent_as_png_evenly_spaced_in_order_of_time() -> None:
    def render(state: np.ndarray, actions: np.ndarray, moments: Sequence[int]) -> list[np.ndarray]:
        return [np.full((8, 6, 3), 10 * state[0] + moment, np.uint8) for moment in moments]

    with always(answers(1, 1)) as server:
        for frames in (1, 2, 3, 99):
            labels(teacher(server, frames=frames, render=render), query(2, states=True))
    shades = [[int(p[0, 0, 0]) for p in pictures(request, 1, "second")] for request in server.requests]
    assert shades == [[33], [30, 33], [30, 32, 33], [30, 31, 32, 33]]  # state 3, after 0 to 3 steps
    assert pictures(server.requests[0], 0, "first")[0].shape == (8, 6, 3)


def test_the_pictures_are_those_of_the_episode() -> None:
    with hydra.initialize_config_module("pbrl.conf", version_base="1.3"):
        config = hydra.compose(
            "train", overrides=["env=pointmass", "teacher=http-frames", "teacher.url=http://127.0.0.1:1/"]
        )
    renderer = hydra.utils.instantiate(config.teacher, _convert_="all").render
    env = PointMass()
    env.reset(seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 2)).astype(np.float32)
    state, seen = env.get_state(), [env.render()]
    for action in actions:
        env.step(action)
        seen.append(env.render())
    shown = renderer(state, actions, [0, 4, 6])
    assert all(np.array_equal(shown[i], seen[moment]) for i, moment in enumerate((0, 4, 6)))
    assert not np.array_equal(seen[0], seen[6])


def test_pictures_that_cannot_be_taken_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^frames=2; expected 0, or a renderer"):
        HTTPTeacher("http://127.0.0.1:1/", frames=2)
    monkeypatch.setattr("pbrl.launch.build.as_environment", lambda env: PlainEnvironment(env))
    own = ("teacher.url=http://127.0.0.1:1/", "env.horizon=50")
    with pytest.raises(ConfigError, match=r"teacher=teachers.http.HTTPTeacher shows clips, .* state can be restored"):
        tiny_loop(tmp_path / "run", "teacher=http-frames", *own)
    tiny_loop(tmp_path / "run", "teacher=http", *own).release()


def test_a_token_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Authorization"])
        send(handler, answers(1))

    seen: list[str | None] = []
    with Server(reply) as server:
        labels(teacher(server), query(1))
        monkeypatch.setenv(TOKEN, "s3cret")
        labels(teacher(server), query(1))
    assert seen == [None, "Bearer s3cret"]
    monkeypatch.setenv(TOKEN, "two words\n")
    with pytest.raises(ValueError, match=f"^{TOKEN} has spaces") as error:
        teacher(server)
    assert "two" not in str(error.value)


# When it is not


def test_failing_servers_are_asked_again() -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        send(handler, answers(1) if number == 3 else b"overloaded", 200 if number == 3 else (500, 429)[number - 1])

    with Server(reply) as server:
        asked = teacher(server)
        assert labels(asked, query(1)) == [1]
    assert asked.metrics() == {"teacher/http_retries": 2}
    assert len({request["id"] for request in server.requests}) == 1


def test_pauses_double(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("teachers.http.time.sleep", pauses.append)
    with always(b"", 503) as server, pytest.raises(HTTPTeacherError, match=r"after 5 attempts: HTTP 503"):
        labels(teacher(server, retries=4, backoff=10.0), query(1))
    assert pauses == [10, 20, 40, 60]


def test_pauses_stay_a_minute_however_many_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("teachers.http.time.sleep", pauses.append)
    asked = HTTPTeacher("http://127.0.0.1:1/", retries=2000)
    for attempt in (1024, 1025, 2000):
        asked._pause(attempt, "down")
    assert pauses == [60.0] * 3


def test_every_attempt_through_a_proxy_is_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(connection: socket.socket) -> None:
        seen.append(connection.recv(65_536).split(b" HTTP/1.")[0])
        connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    seen: list[bytes] = []
    with contextlib.ExitStack() as stack:
        for name in ("HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{served(fail, stack)}")
        asked = HTTPTeacher("https://judge.example/label", timeout=5.0, retries=3, backoff=0.01)
        with pytest.raises(HTTPTeacherError, match="after 4 attempts"):
            labels(asked, query(1))
    assert seen == [b"CONNECT judge.example:443"] * 4


@pytest.mark.parametrize("status", [302, 400, 401, 404])
def test_refusals_are_not_repeated(status: int) -> None:
    with always(b"no", status) as server, pytest.raises(HTTPTeacherError, match=f"{server.url} refused.*{status}"):
        labels(teacher(server), query(1))
    assert len(server.requests) == 1


def test_a_silent_server_times_out() -> None:
    with (
        Server(lambda number, request, handler: time.sleep(0.5)) as server,
        pytest.raises(HTTPTeacherError, match=r"after 2 attempts: no whole reply within 0\.1 s"),
    ):
        labels(teacher(server, timeout=0.1, retries=1), query(1))


def test_a_server_that_drips_times_out() -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    with Server(reply) as server, pytest.raises(HTTPTeacherError, match=r"no whole reply within 0\.2 s"):
        labels(teacher(server, timeout=0.2, retries=0), query(1))


def drip(connection: socket.socket, text: bytes, pause: float, size: int = 1) -> None:
    for start in itertools.cycle(range(0, len(text), size)):
        connection.sendall(text[start : start + size])
        time.sleep(pause)


OK = b"HTTP/1.1 200 OK\r\n"
SLOW: dict[str, Callable[[socket.socket], Any]] = {
    "silence": lambda c: time.sleep(9),
    "a status line byte by byte": lambda c: drip(c, OK, 0.2),
    "a header byte by byte": lambda c: (c.sendall(OK), drip(c, b"X-A: " + b"a" * 60_000, 0.2))[1],
    "header after header": lambda c: (c.sendall(OK), drip(c, b"X-A: a\r\n", 0.05, 8))[1],
    "100 Continue for ever": lambda c: drip(c, b"HTTP/1.1 100 Continue\r\n\r\n", 0.01, 25),
    "a body byte by byte": lambda c: (c.sendall(OK + b"Content-Length: 99\r\n\r\n"), drip(c, b" ", 0.2))[1],
    "a body without a length": lambda c: (c.sendall(OK + b"\r\n"), drip(c, b" ", 0.2))[1],
    "chunk by chunk": lambda c: (
        c.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n"),
        drip(c, b"1\r\n \r\n", 0.3, 6),
    )[1],
    "a request read slowly": lambda c: all(not time.sleep(0.1) for _ in iter(lambda: c.recv(64), b"")),
    "a handshake byte by byte": lambda c: drip(c, b"\x16\x03\x03\x40\x00" + b"\x02" * 16_000, 0.2),
    "a slow name look-up": lambda c: None,
}


def served(behaviour: Callable[[socket.socket], None], stack: contextlib.ExitStack) -> int:
    """The port of a server that treats each connection so, without reading the request first."""
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    behaviour(connection)

    threading.Thread(target=serve, daemon=True).start()
    return int(listening.getsockname()[1])


def held(name: str, timeout: float) -> float:
    """Seconds after which a teacher gives this server up."""
    with contextlib.ExitStack() as stack:
        port = served(SLOW[name], stack)
        scheme = "https" if "handshake" in name else "http"
        host = "slow.invalid" if "name" in name else "127.0.0.1"
        asked = HTTPTeacher(f"{scheme}://{host}:{port}/", timeout=timeout, retries=0)
        body = b" " * (30_000_000 if "request" in name else 10)
        begun = time.monotonic()
        with pytest.raises(HTTPTeacherError, match=f"no whole reply within {timeout:g} s"):
            asked._post(body, limit=4096)
        return time.monotonic() - begun


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def slow(host: Any, *args: Any, **options: Any) -> Any:
        time.sleep(9 if host == "slow.invalid" else 0)
        return look_up("127.0.0.1" if host == "slow.invalid" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)


def lateness(seconds: float) -> float:
    """How late this machine wakes a thread that waits for nothing but the time: its load, and no fault of a teacher."""
    begun = time.monotonic()
    with pytest.raises(queue.Empty):
        queue.SimpleQueue().get(timeout=seconds)
    return time.monotonic() - begun - seconds


@pytest.mark.slow
def test_the_time_limit_holds_for_the_whole_exchange_within_a_tenth(slow_names: None) -> None:
    with ThreadPoolExecutor(2 * len(SLOW)) as pool:
        bare = [pool.submit(lateness, 2.0) for _ in SLOW]  # at the same time, in the same process
        seconds = dict(zip(SLOW, pool.map(lambda name: held(name, 2.0), SLOW), strict=True))
        late = max(waiting.result() for waiting in bare)
    print({name: f"{value:.3f} s" for name, value in seconds.items()}, f"a bare wait is {late:.3f} s late")
    assert all(1.99 <= value <= 2.2 + late for value in seconds.values()), (seconds, late)


def test_a_header_byte_by_byte_does_not_outlast_the_time_limit() -> None:
    assert held("a header byte by byte", 0.3) < 0.6


def test_headers_are_bounded() -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)

    with Server(reply) as server, pytest.raises(HTTPTeacherError, match="the server sent more than 69696 bytes"):
        labels(teacher(server), query(1))


def test_what_a_server_sends_is_escaped_before_it_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 500 \x1b]0;owned\x07\x1b[2J" + b"x" * 5000 + b"\r\nContent-Length: 0\r\n\r\n")

    with (
        Server(reply) as server,
        pytest.raises(HTTPTeacherError, match=r"HTTP 500 \\x1b\]0;owned\\x07\\x1b\[2Jx") as error,
    ):
        labels(teacher(server, retries=1), query(1))
    for text in (str(error.value), caplog.text.rstrip("\n")):
        assert text.isprintable()
        assert len(text) < 1000


def test_a_connection_cut_in_the_middle_is_retried() -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        body = answers(1)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body if number == 2 else body[:4])

    with Server(reply) as server:
        assert labels(teacher(server), query(1)) == [1]
    assert len(server.requests) == 2


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_dead_server_is_an_error_that_says_how_to_go_on() -> None:
    url = f"http://127.0.0.1:{closed_port()}/label"
    with pytest.raises(HTTPTeacherError, match=rf"no answer from {url} after 3 attempts.*refused.*resume=RUN"):
        labels(HTTPTeacher(url, retries=2, backoff=0.01), query(1))


def counting(failing: int) -> Server:
    """Its n-th reply says n / 10 of each pair, but the one with this number fails."""

    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        fails = number == failing
        send(handler, answers(*[number / 10] * len(request["pairs"])), 500 if fails else 200)

    return Server(reply)


def test_answers_of_a_query_cut_short_are_kept(tmp_path: Path) -> None:
    with counting(3) as server:
        asked = teacher(server, pairs_per_request=2, retries=0)
        with pytest.raises(TeacherError, match=r"failed on pair 4 of 6: no answer from .* after 1 attempts: HTTP 500"):
            ask(asked, query(6), AnswerJournal(tmp_path / "answers.jsonl"))
        answer = ask(asked, query(6), AnswerJournal(tmp_path / "answers.jsonl"))
        assert answer.prefers_first.tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.4, 0.4])
        again = ask(asked, query(6), AnswerJournal(tmp_path / "answers.jsonl"))
        assert torch.equal(again.prefers_first, answer.prefers_first)
    assert [len(request["pairs"]) for request in server.requests] == [2, 2, 2, 2]
    assert server.requests[2]["id"] == server.requests[3]["id"], "it may answer from memory"


def test_parts_answered_before_a_kill_are_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"

    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        if number == 3:
            shown.append(path.read_bytes().count(b"\n"))
        send(handler, answers(1, None), 500 if number == 3 else 200)

    shown: list[int] = []
    with Server(reply) as server, pytest.raises(TeacherError):
        ask(teacher(server, pairs_per_request=2, retries=0), query(6), AnswerJournal(path))
    assert shown == [4], "what a kill leaves while the third part is being judged"


def test_an_interrupt_waits_for_the_labels_of_a_part_and_for_no_other_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(*arguments: Any) -> None:
        write(*arguments)
        if not interrupts.requested:
            interrupts._handle(signal.SIGINT, None)  # while the first of two labels is written down

    path, interrupts = tmp_path / "answers.jsonl", Interrupts()
    journal = AnswerJournal(path)
    write = journal.append
    monkeypatch.setattr(journal, "append", append)
    with counting(0) as server:
        asked = teacher(server, pairs_per_request=2)
        with pytest.raises(KeyboardInterrupt):
            ask(asked, query(4), journal, interrupts.set_asking)
        assert path.read_bytes().count(b"\n") == 2 and not asked.at_hand
        ask(asked, query(4), AnswerJournal(path))
    assert [len(request["pairs"]) for request in server.requests] == [2, 2], "no pair is judged twice"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "which is not JSON"),
        (b"\xff\xfe", "which is not JSON"),
        (b"[" * 4000, "which is not JSON"),
        (b"", "which is not JSON"),
        (b"[1, 1]", r'expected \{"answers"'),
        (b'{"answers": 1}', r'expected \{"answers"'),
        (answers(1), "1 answers to 2 pairs"),
        (answers(1, 1, 1), "3 answers to 2 pairs"),
        (answers(1, 2.0), r"pair 1 with 2\.0"),
        (answers(-0.5, 1), r"pair 0 with -0\.5"),
        (b'{"answers": [1, NaN]}', "pair 1 with nan"),
        (b'{"answers": [1, Infinity]}', "pair 1 with inf"),
        (answers(1, "first"), "pair 1 with 'first'"),
        (answers(True, 1), "pair 0 with True"),
        (answers(1, [0]), r"pair 1 with \[0\]"),
        (answers(1, 10**300), "pair 1 with 1000"),
        (b" " * 10**6, "more than .* bytes"),
    ],
    ids=range(17),
)
def test_malformed_answers_are_named_and_not_repeated(body: bytes, message: str) -> None:
    with always(body) as server, pytest.raises(HTTPTeacherError, match=f"{server.url} (sent|answered) .*{message}"):
        labels(teacher(server), query(2))
    assert len(server.requests) == 1


def test_a_malformed_answer_is_counted_within_the_whole_query() -> None:
    def reply(number: int, request: Any, handler: BaseHTTPRequestHandler) -> None:
        send(handler, answers(1, 1 if number < 3 else 7))

    with Server(reply) as server, pytest.raises(HTTPTeacherError, match="pair 5 with 7"):
        labels(teacher(server, pairs_per_request=2), query(6))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=7), inner, max_size=3),
    max_leaves=8,
)
replies = (
    st.binary(max_size=40)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.lists(json_values, max_size=3).map(lambda values: answers(*values))
    | st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=2).map(lambda values: answers(*values))
)


@pytest.fixture(scope="module")
def changeable() -> Iterator[tuple[Server, list[bytes]]]:
    body = [b""]
    with Server(lambda number, request, handler: send(handler, body[0])) as server:
        yield server, body


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(replies)
def test_any_reply_gives_labels_or_one_clear_error(changeable: tuple[Server, list[bytes]], reply: bytes) -> None:
    server, body = changeable
    body[0] = reply
    try:
        found = labels(teacher(server), query(2))
    except HTTPTeacherError as error:
        assert server.url in str(error)
        assert len(str(error)) < 500
    else:
        assert found == json.loads(reply)["answers"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "127.0.0.1:8000", "http://", ""])
def test_only_http_is_spoken(url: str) -> None:
    with pytest.raises(ValueError, match="expected http://"):
        HTTPTeacher(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@judge/label", "expected no password"),
        ("http://judge/a label", "percent-encode"),
        ("http://judge/läbel", "percent-encode"),
        ("http://jüdge/label", "percent-encode"),
    ],
)
def test_what_cannot_be_posted_to_is_refused_at_once(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^url is .*{message}") as error:
        HTTPTeacher(url)
    assert "secret" not in str(error.value)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout=0"):
        HTTPTeacher("http://localhost/", timeout=0)


def test_observations_that_are_no_numbers_are_not_sent() -> None:
    asked = query(2)
    asked.second.obs[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        labels(HTTPTeacher("http://127.0.0.1:1/"), asked)


# The example server


@pytest.fixture
def example_server() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "teachers.example_server", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().split()[2].rstrip(";")
    process.terminate()
    process.wait()
    process.stdout.close()


def test_the_example_server_prefers_less_energy(example_server: str) -> None:
    asked = HTTPTeacher(example_server, retries=0)
    # energies per number: 0, 0.01, 0.04, 0.09, 0.16 against 0.0625
    assert labels(asked, query(5)) == [1, 1, 1, 0, 0]
    both = Query(query(1).first, query(1).first, torch.zeros(1, 2, 3))
    assert labels(asked, both) == [0.5]


def test_the_example_server_refuses_what_is_no_request(example_server: str) -> None:
    for body in (b"", b"{}", b"[]", b"[" * 5000, b'{"id": [], "pairs": 3}'):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(example_server, body, timeout=5)
        assert caught.value.code == 400
        caught.value.close()


def test_the_example_server_judges_a_request_once_though_it_is_repeated_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(first: Any, second: Any) -> float:
        judged.append(first)
        time.sleep(0.3)
        return 1.0

    judged: list[Any] = []
    monkeypatch.setattr(example, "judge", slow)
    with ThreadingHTTPServer(("127.0.0.1", 0), example.Handler) as server:
        server.daemon_threads = False  # closing waits for what is left of them
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        asked = HTTPTeacher(f"http://127.0.0.1:{server.server_port}/", timeout=0.2, retries=50, backoff=0.01)
        try:
            assert labels(asked, query(2)) == [1, 1]
        finally:
            server.shutdown()
    assert asked.metrics()["teacher/http_retries"] >= 2 and len(judged) == 2
    assert "Traceback" not in capsys.readouterr().err, "of a client that has left"
