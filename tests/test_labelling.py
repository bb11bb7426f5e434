"""The store of people's answers, the page's server and what is refused there; the page itself: test_labelling_page."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from envs.pointmass import PointMass
from pbrl.asking import AnswerJournal, ask
from pbrl.label import environment
from pbrl.labelling import drawing, server
from pbrl.labelling.service import Service
from pbrl.labelling.store import LabelStore, Pair, Refused, Shown, Taken
from pbrl.labelling.teacher import HumanTeacher, pair_keys, pairs
from pbrl.launch.configuration import ConfigError
from pbrl.launch.shipped import described
from pbrl.preferences import Preferences
from pbrl.queries import Distinct, difference
from pbrl.rollouts import Rollouts
from pbrl.types import Query
from tests.conftest import tiny_loop
from tests.films import read_film
from tests.people import AnsweredPage, wait_for

STEPS = 10


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_store(path: Path, count: int = 4, clock: Any = None, **options: Any) -> LabelStore:
    store = LabelStore(path / "labels.sqlite3", **{"repeats": 0.0, **options}, **({"clock": clock} if clock else {}))
    store.post([Pair(f"k{i}", b"clips", (float(i), 1.5)) for i in range(count)])
    return store


def give(store: LabelStore, rater: str, label: float | None, name: str | None = None) -> Shown:
    shown = store.next(rater)
    assert shown is not None
    store.answer(name or f"{rater}-{shown}-{store.clock()}", rater, shown, label, 2.0)
    return shown


def recorded(count: int, seed: int = 0) -> Query:
    """Questions about random motion of the point."""
    env, rng = PointMass(), np.random.default_rng(seed)
    rollouts = Rollouts(1000, 2, 2, env.state_size)
    for episode in range(4):
        obs, _ = env.reset(seed=episode)
        done = False
        while not done:
            action, state = rng.uniform(-1, 1, 2).astype(np.float32), env.get_state()
            following, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            rollouts.add(obs, action, action, reward, state, done)
            obs = following
    return rollouts.query(count, STEPS, rng)


# ------------------------------------------------------------------------------------------------------- the store


def test_questions_come_in_order_and_their_labels_back(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    keys = ["k0", "k1", "k2", "k3"]
    for label in (1.0, 0.5, None):
        assert store.use(keys, 1, 100) is None
        give(store, "you", label)
    assert store.progress("you") == {"open": 4, "complete": 3, "mine": 3}
    give(store, "you", 0.0)
    assert store.next("you") is None
    assert store.use(keys, 1, 100) == [Taken("k0", 1.0), Taken("k1", 0.5), Taken("k2", None), Taken("k3", 0.0)]
    assert store.progress("you") == {"open": 0, "complete": 0, "mine": 4}
    store.post([Pair("k1", b"clips"), Pair("new", b"clips")])
    assert store.progress("you")["open"] == 1, "a used question is not asked again"
    assert store.use(["k1"], 2, 200) == [Taken("k1", 0.5)]


def test_an_answer_sent_twice_counts_once_and_another_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    shown = give(store, "you", 1.0, "a")
    store.answer("a", "you", shown, 1.0, 2.0)  # the reply was lost: the page sends it again
    with pytest.raises(Refused, match="undo it first"):
        store.answer("b", "you", shown, 0.0, 2.0)  # a second tab
    with pytest.raises(Refused, match="no longer asked"):
        store.answer("c", "anna", shown, 0.0, 2.0)
    with pytest.raises(Refused, match="no such pair"):
        store.answer("d", "you", Shown(99, False), 0.0, 2.0)
    assert store.progress("you")["complete"] == 1


def test_undo_gives_the_pair_back_until_it_is_used(tmp_path: Path) -> None:
    store = make_store(tmp_path, 2)
    first = give(store, "you", 1.0, "a")
    assert store.last("you") == "a"
    store.undo("you", "a")
    store.undo("you", "a")  # sent twice
    assert store.next("you") == first
    store.answer("a", "you", first, 1.0, 1.0)  # a late copy of what was undone
    assert store.progress("you")["complete"] == 0
    give(store, "you", 0.0, "b")
    give(store, "you", 0.0, "c")
    with pytest.raises(Refused, match="no such answer"):
        store.undo("anna", "c")
    assert store.use(["k0", "k1"], 1, 10) == [Taken("k0", 0.0), Taken("k1", 0.0)]
    assert store.last("you") is None
    with pytest.raises(Refused, match="in use"):
        store.undo("you", "c")


def test_the_last_answer_can_be_undone_for_a_moment(tmp_path: Path, clock: Clock) -> None:
    store = make_store(tmp_path, 1, clock)
    give(store, "you", 1.0)
    assert store.use(["k0"], 1, 10, pause=3.0) is None
    clock.now += 3.0
    assert store.use(["k0"], 1, 10, pause=3.0) == [Taken("k0", 1.0)]


def test_a_pair_is_with_one_person_until_the_lease_ends(tmp_path: Path, clock: Clock) -> None:
    store = make_store(tmp_path, 2, clock, lease=60.0)
    anna, ben = store.next("anna"), store.next("ben")
    assert anna != ben
    assert store.next("anna") == anna, "the same after a reload"
    assert store.next("carl") is None
    clock.now += 61
    assert store.next("carl") == anna, "anna's laptop sleeps"
    assert store.next("ben") == ben, "nobody took it: ben may go on"
    assert anna is not None
    store.answer("late", "anna", anna, 1.0, 1.0)  # she wakes up before carl has answered
    with pytest.raises(Refused, match="no longer asked"):
        store.answer("carl", "carl", anna, 0.0, 1.0)


def test_a_page_left_open_keeps_no_pair_from_others(tmp_path: Path, clock: Clock) -> None:
    store = make_store(tmp_path, 1, clock, lease=60.0)
    anna = store.next("anna")
    for _ in range(30):  # she has left, her page looks every 2.5 seconds
        assert store.next("anna") == anna, "hers while nobody else asks"
        clock.now += 2.5
    assert store.next("ben") == anna
    assert store.next("anna") is None, "now it is with ben"


def test_two_reviews_make_a_soft_label(tmp_path: Path) -> None:
    store = make_store(tmp_path, 3, reviews=2)
    for label in (1.0, 1.0, None):
        give(store, "anna", label)
    assert store.use(["k0"], 1, 10) is None
    assert store.next("anna") is None, "nobody answers a pair twice"
    for label in (1.0, 0.0, 0.5):
        give(store, "ben", label)
    taken = store.use(["k0", "k1", "k2"], 1, 10)
    assert taken == [Taken("k0", 1.0), Taken("k1", 0.5), Taken("k2", 0.5)]
    # shared pairs: 1 and 1, 1 and 0; the third has one label only
    assert store.raters()["anna"]["agreement"] == 0.5


def test_repeats_measure_a_rater_and_nothing_else(tmp_path: Path) -> None:
    store = make_store(tmp_path, 6, repeats=0.34)
    shown = []
    while (task := store.next("you")) is not None:
        shown.append(task)
        # always the left one: on a repeat, sides swapped, that says the opposite
        store.answer(f"a{len(shown)}", "you", task, 1.0, 2.0)
    assert [task.question for task in shown if not task.repeat] == [1, 2, 3, 4, 5, 6]
    assert [task.question for task in shown if task.repeat] == [1]
    numbers = store.raters()["you"]
    assert numbers["consistency"] == 0.0 and numbers["answers"] == 6.0 and numbers["median_seconds"] == 2.0
    # k2, k3, … have the larger task return on the left; k0 and k1 do not
    assert numbers["task_agreement"] == pytest.approx(4 / 6)
    assert all(taken.label == 1.0 for taken in store.use([f"k{i}" for i in range(6)], 1, 10) or [])


def test_what_a_session_took_in_stays_so(tmp_path: Path) -> None:
    store = make_store(tmp_path, 4)
    keys = ["k0", "k1", "k2", "k3"]
    assert store.take(keys, 1, 100) == []
    give(store, "you", 1.0)
    give(store, "you", None)
    assert store.take(keys, 1, 100) == [], "a resumed run comes by session 1 again: nothing was there then"
    assert store.take(keys, 2, 200) == [Taken("k0", 1.0), Taken("k1", None)]
    give(store, "you", 0.0)
    assert store.take(keys, 2, 200) == [Taken("k0", 1.0), Taken("k1", None)]
    assert store.take(keys[2:], 3, 300) == [Taken("k2", 0.0)]
    assert store.take(keys, 1, 100) == []


def test_withdrawn_questions_are_not_asked_and_their_answers_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, 3)
    give(store, "you", 1.0)
    held = store.next("you")
    store.post([Pair("k0", b"clips"), Pair("other", b"clips")])
    assert store.progress("you") == {"open": 2, "complete": 1, "mine": 1}
    assert held is not None and store.next("you") != held
    with pytest.raises(Refused, match="withdrawn"):
        store.answer("late", "you", held, 1.0, 1.0)


def test_a_store_is_refused_if_it_is_none_or_a_number_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "no").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match="is not a store of labels"):
        LabelStore(tmp_path / "no")
    with pytest.raises(OSError, match=r"no-folder/labels\.sqlite3: unable to open"):
        LabelStore(tmp_path / "no-folder" / "labels.sqlite3")
    with pytest.raises(ValueError, match="reviews=0"):
        LabelStore(tmp_path / "new", reviews=0)
    store = make_store(tmp_path)
    for name in ("", "a" * 41, "<b>", "a/b", "../x", "\n"):
        with pytest.raises(Refused, match="rater's name"):
            store.next(name)


KILLED = """
import os, signal, sys
from pbrl.labelling.store import LabelStore
store = LabelStore(sys.argv[1], repeats=0.0)
for i in range(int(sys.argv[2])):
    store.answer(f"a{i}", "you", store.next("you"), 1.0, 1.0)
print("given", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("given", [1, 3])
def test_each_answer_survives_kill_9(tmp_path: Path, given: int) -> None:
    make_store(tmp_path).close()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "labels.sqlite3"), str(given)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and "given" in killed.stdout, killed.stderr
    store = LabelStore(tmp_path / "labels.sqlite3", repeats=0.0)
    assert store.progress("you") == {"open": 4, "complete": given, "mine": given}
    assert store.next("you") == Shown(given + 1, False)


# ------------------------------------------------------------------------------------------- clips, pairs, choosing


def test_clips_show_both_motions_and_are_never_black(tmp_path: Path) -> None:
    query = recorded(1)
    assert query.states is not None
    actions = np.stack([query.first.actions[0].numpy(), query.second.actions[0].numpy()])
    clips = drawing.pack(query.states[0].numpy(), actions)
    frames = []
    for swapped in (False, True):
        path = tmp_path / f"{swapped}.mp4"
        path.write_bytes(drawing.film(PointMass(), clips, 64, 0.1, swapped))
        frames.append(read_film(path, 64, 2 * 64 + drawing.GAP))
    assert min(frame.mean() for frame in frames[0]) > 100
    env = PointMass()
    for moment, frame in ((0, frames[0][0]), (STEPS, frames[0][-1])):
        for side, part in ((0, frame[:, :64]), (1, frame[:, -64:])):
            env.set_state(query.states[0, side].numpy())
            for action in actions[side][:moment]:
                env.step(action)
            assert np.abs(part.astype(int) - env.render(64, 64).astype(int)).mean() < 6, (moment, side)
    left, right = frames[0][0][:, :64].astype(int), frames[1][0][:, -64:].astype(int)
    assert np.abs(left - right).mean() < 6, "swapped"


def test_the_end_comes_in_the_middle_of_a_clip(tmp_path: Path) -> None:
    query = recorded(1)
    clips = pairs(query)[0].clips
    process = drawing.Process({"_target_": "envs.pointmass.PointMass"}, 64)
    refused: list[str] = []

    def draw() -> None:
        try:
            while True:
                process.film(clips)
        except RuntimeError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # the first of them starts the process
    process.stop()
    for thread in threads:
        thread.join(20)
    assert refused == ["no more clips are drawn"] * 3


def test_short_segments_are_slowed_down() -> None:
    assert drawing.timing(50, 0.0125) == (0.625, drawing.SHORTEST)
    assert drawing.timing(100, 0.025) == (2.5, 2.5)


@pytest.mark.parametrize("damaged", [b"", b"nonsense", drawing.pack(np.zeros((2, 3)), np.zeros((1, 4, 2)))])
def test_damaged_clips_are_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        drawing.unpack(damaged)


def test_equal_pairs_have_equal_keys_and_others_do_not() -> None:
    query = recorded(3)
    keys = pair_keys(Query.cat([query, query[[1]]]))
    assert keys[3] == keys[1] and len(set(keys)) == 3
    swapped = Query(query.second, query.first, query.task_rewards.flip(1))
    assert not set(pair_keys(swapped)) & set(keys)


def test_distinct_pairs_differ_visibly_and_come_first() -> None:
    query = recorded(40)
    same = Query(query.first, query.first, query.task_rewards)[:40]
    candidates = Query.cat([same, Query(query.first, query.second, query.task_rewards)])
    rule: Any = Distinct(pool=10)
    picks = rule(candidates, 8, None, [], np.random.default_rng(0))
    apart = difference(candidates.first, candidates.second)
    assert (apart[:40] == 0).all() and (picks >= 40).all() and len(set(picks)) == 8
    assert (np.diff(apart[picks]) <= 0).all()
    assert torch.equal(torch.tensor(apart), torch.tensor(difference(candidates.second, candidates.first))), "symmetric"


# ------------------------------------------------------------------------------------------------------ the server


def settings(path: Path, **changed: Any) -> dict[str, Any]:
    return {
        "path": str(path),
        "env": {"_target_": "envs.pointmass.PointMass"},
        "task": "<img src=x onerror=alert(1)>",
        "wait": True,
        "reviews": 1,
        "lease": 120.0,
        "repeats": 0.0,
        "steps": STEPS,
        "host": "127.0.0.1",
        "size": 64,
        "draw": False,
        **changed,
    }


class Client:
    """Speaks to a server as the page does, and as it does not."""

    def __init__(self, service: Service | AnsweredPage) -> None:
        self.port, self.token = service.port, service.link.rpartition("#")[2]

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        given = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", **(headers or {})}
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, {k: v for k, v in given.items() if v})
            reply = connection.getresponse()
            return reply.status, reply.read(), {k.lower(): v for k, v in reply.getheaders()}
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        status, content, _ = self.request("POST", path, {"rater": "you", **body})
        assert status == 200, content
        return dict(json.loads(content))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, LabelStore]]:
    """A server without drawing, and its store."""
    folder = tmp_path_factory.mktemp("served")
    store = make_store(folder, 1200)
    service = Service(settings(store.path))
    yield Client(service), store
    service.close()
    store.close()


GOOD = {"rater": "you", "answer": "x", "number": 1, "repeat": False, "label": 1, "seconds": 1.0}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/api/state", {"rater": "you"}, {"Authorization": ""}, 403),
        ("POST", "/api/state", {"rater": "you"}, {"Authorization": "Bearer wrong"}, 403),
        ("GET", "/api/clip?number=1&repeat=false", None, {"Authorization": "Bearer wrong"}, 403),
        ("POST", "/api/state", {"rater": "you"}, {"Host": "evil.example"}, 421),
        ("GET", "/", None, {"Host": "127.0.0.1.evil.example:80"}, 421),
        ("POST", "/api/answer", GOOD, {"Origin": "http://evil.example"}, 403),
        ("POST", "/api/answer", GOOD, {"Origin": "null"}, 403),
        ("POST", "/api/answer", GOOD, {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/api/clip?number=1&repeat=false", None, {"Sec-Fetch-Site": "same-site"}, 403),
        ("GET", "/", None, {"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}, 403),
        ("GET", "/", None, {"Sec-Fetch-Site": "cross-site", "Host": "evil.example"}, 421),
        ("POST", "/api/answer", GOOD, {"Content-Type": "text/plain"}, 415),
        ("GET", "/../../../../etc/passwd", None, {}, 404),
        ("GET", "/%2e%2e/%2e%2e/setup.cfg", None, {}, 404),
        ("GET", "/page/../store.py", None, {}, 404),
        ("GET", "/api/clip?number=../../x", None, {}, 400),
        ("GET", "/api/clip?number=99999", None, {}, 404),
        ("DELETE", "/api/answer", GOOD, {}, 404),
        ("POST", "/api/answer", b"{", {}, 400),
        ("POST", "/api/answer", b"[" * 4000, {}, 400),
        ("POST", "/api/answer", b"\xff\xfe", {}, 400),
        ("POST", "/api/answer", [1], {}, 400),
        ("POST", "/api/answer", b" " * 5000, {}, 413),
        ("POST", "/api/answer", {**GOOD, "rater": "a/b"}, {}, 400),
        ("POST", "/api/answer", {**GOOD, "rater": 7}, {}, 400),
        ("POST", "/api/answer", {**GOOD, "label": 0.7}, {}, 400),
        ("POST", "/api/answer", {**GOOD, "label": True}, {}, 400),
        ("POST", "/api/answer", {**GOOD, "label": [1]}, {}, 400),
        ("POST", "/api/answer", {k: v for k, v in GOOD.items() if k != "label"}, {}, 400),
        ("POST", "/api/answer", {**GOOD, "number": "1"}, {}, 400),
        ("POST", "/api/answer", {**GOOD, "number": -1}, {}, 400),
        ("POST", "/api/answer", {**GOOD, "repeat": 1}, {}, 400),
        ("POST", "/api/answer", json.dumps({**GOOD, "seconds": 1}).replace("1}", "NaN}").encode(), {}, 400),
        ("POST", "/api/answer", json.dumps({**GOOD, "seconds": 10**400}).encode(), {}, 400),
        ("POST", "/api/answer", {**GOOD, "answer": "x" * 100}, {}, 400),
    ],
)
def test_what_is_wrong_is_refused_in_a_line(
    served: tuple[Client, LabelStore], method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    client, store = served
    got, content, _ = client.request(method, path, body, headers)
    assert got == status
    assert content.count(b"\n") == 1 and len(content) < 200 and client.token.encode() not in content
    assert store.progress("you")["mine"] == 0, "nothing was written"


@pytest.mark.parametrize("site", ["none", "same-origin", "same-site", "cross-site"])
def test_a_link_from_any_page_opens_the_page(served: tuple[Client, LabelStore], site: str) -> None:
    headers = {"Authorization": "", "Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    status, page, _ = served[0].request("GET", "/", None, headers)
    assert status == 200 and b"<script src=" in page


def test_headers_keep_the_page_to_itself(served: tuple[Client, LabelStore]) -> None:
    status, page, headers = served[0].request("GET", "/", None, {"Authorization": ""})
    assert status == 200 and b"<script src=" in page and served[0].token.encode() not in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
    assert "server" not in headers


def test_floods_and_broken_connections_leave_it_standing(served: tuple[Client, LabelStore]) -> None:
    client, _ = served
    for junk in (
        b"\0" * 3000,
        b"GET " + b"a" * 70_000,
        b"POST /api/state HTTP/1.1\r\nContent-Length: 99999999\r\n\r\nx",
    ):
        with socket.create_connection(("127.0.0.1", client.port), timeout=5) as connection:
            connection.sendall(junk)
    codes = [client.request("POST", "/api/state", {"rater": "you"}, {"Authorization": ""})[0] for _ in range(400)]
    assert codes.count(403) >= 200 and set(codes) <= {403, 429}
    wait_for(lambda: client.request("POST", "/api/state", {"rater": "you"})[0] == 200, 10)


def test_a_flood_without_the_token_keeps_nobody_out(tmp_path: Path) -> None:
    make_store(tmp_path, 0).close()
    page = AnsweredPage(settings(tmp_path / "labels.sqlite3"))
    page.app.strangers = server.Bucket(0.0, 3.0)
    try:
        client = Client(page)
        codes = [client.request("GET", "/api/robot", None, {"Authorization": "Bearer guess"})[0] for _ in range(5)]
        assert codes == [403, 403, 403, 429, 429]
        assert client.request("POST", "/api/state", {"rater": "you"})[0] == 200
    finally:
        page.close()


def test_connections_without_a_whole_request_do_not_keep_people_out(served: tuple[Client, LabelStore]) -> None:
    client, _ = served
    with contextlib.ExitStack() as stack:
        for i in range(150):  # more than it serves at once
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=5))
            connection.sendall(b"POST /api/state HTTP/1.1\r\nX-A: " + b"a" * i)
        for _ in range(5):
            assert client.request("GET", "/", None, {"Authorization": ""})[0] == 200


def test_a_request_header_by_header_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WAITING_SECONDS", 0.3)
    make_store(tmp_path, 0).close()
    page = AnsweredPage(settings(tmp_path / "labels.sqlite3"))
    try:
        with socket.create_connection(("127.0.0.1", page.port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            begun = time.monotonic()
            with contextlib.suppress(ConnectionError):  # the other side has hung up
                while time.monotonic() < begun + 20:
                    connection.sendall(b"X-A: a\r\n")
                    time.sleep(0.02)
            assert time.monotonic() - begun < 10
    finally:
        page.close()


@pytest.mark.slow
def test_a_thousand_answers_at_twenty_a_second(served: tuple[Client, LabelStore]) -> None:
    client, store = served
    state, taken = client.post("/api/state", rater="fast"), []
    begin = time.monotonic()
    for i in range(1000):
        time.sleep(max(begin + i / 20 - time.monotonic(), 0))
        at = time.monotonic()
        state = client.post("/api/answer", rater="fast", answer=f"fast{i}", **state["question"], label=1, seconds=0.05)
        taken.append(time.monotonic() - at)
        assert state["refused"] is None
    assert store.progress("fast")["mine"] == 1000
    print(f"\nanswers: median {np.median(taken) * 1e3:.1f} ms, 95 % below {np.quantile(taken, 0.95) * 1e3:.1f} ms")
    assert np.quantile(taken, 0.95) < 0.1


def test_after_the_end_nothing_is_asked_or_taken_back(tmp_path: Path) -> None:
    store = make_store(tmp_path, 3)
    give(store, "you", 1.0)
    app = server.Labelling({**settings(store.path), "token": ""}, store, server.Clips(store, {}, 64, False), None)
    assert app.state("you")["question"] and app.state("you")["undo"]
    for phase in ("finished", "labelled"):
        app.hear({"status": {"phase": phase}})
        state = app.state("you")
        assert state["question"] is None and state["undo"] is None and state["open"] == 3, phase


def test_the_network_is_named_and_its_names_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path).close()
    service = Service(settings(tmp_path / "labels.sqlite3", host="0.0.0.0"))
    try:
        client = Client(service)
        assert client.request("GET", "/", None, {"Host": f"192.168.3.4:{client.port}"})[0] == 200
        assert client.request("GET", "/", None, {"Host": f"evil.example:{client.port}"})[0] == 421
        assert client.request("POST", "/api/state", {"rater": "you"}, {"Authorization": ""})[0] == 403
    finally:
        service.close()


def test_a_killed_server_comes_back_at_the_same_address_with_every_answer(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    service = Service(settings(store.path))
    try:
        client = Client(service)
        state = client.post("/api/state")
        for i in range(3):
            state = client.post("/api/answer", answer=f"a{i}", **state["question"], label=1, seconds=1.0)
            os.kill(service._process.pid, signal.SIGKILL)
            service._process.wait()
            service.keep_alive()
            assert Client(service).token == client.token and service.port == client.port
            again = client.post("/api/state")
            assert again["complete"] == i + 1 and again["question"] == state["question"]
    finally:
        service.close()
        store.close()


def test_the_token_is_in_no_file_and_in_no_list_of_processes(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    service = Service(settings(store.path))
    try:
        client = Client(service)
        client.post("/api/state")
        for name in ("cmdline", "environ"):
            assert client.token.encode() not in Path(f"/proc/{service._process.pid}/{name}").read_bytes()
        for path in tmp_path.rglob("*"):
            assert client.token.encode() not in path.read_bytes(), path
    finally:
        service.close()
        store.close()


@pytest.mark.parametrize("token", ["secret", *(f"0123456789abcdef{letter}" for letter in '"<>`%/ \nä')])
def test_a_token_that_is_short_or_no_part_of_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("PBRL_LABELLING_TOKEN", token)
    monkeypatch.setattr(Service, "_start", lambda service: None)
    with pytest.raises(ValueError, match="at least 16 characters of A-Z, a-z, 0-9 and") as error:
        Service(settings(tmp_path / "x"))
    assert token not in str(error.value)


def test_a_token_of_all_letters_that_links_keep_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBRL_LABELLING_TOKEN", "Ab0.1_2~3-456789")
    monkeypatch.setattr(Service, "_start", lambda service: None)
    assert Service(settings(tmp_path / "x")).link.endswith("#Ab0.1_2~3-456789")


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.7"])
def test_an_address_that_cannot_be_had_is_named_with_the_way_out(tmp_path: Path, host: str) -> None:
    make_store(tmp_path).close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"host={host} port={port}: .*; expected .* 0: any free one"):
            Service(settings(tmp_path / "labels.sqlite3", host=host), port)


@pytest.mark.parametrize("task", ["door-open", "quadruped-walk", "pointmass"])
def test_a_file_names_the_environment_that_draws_it(task: str) -> None:
    """Also one whose YAML takes its keys from another."""
    env = environment(Path("labels.npz"), None, Preferences({"env": task}))
    assert env == described("env", task, task) and instantiate(env).observation_space


def test_a_file_is_drawn_in_the_environment_of_its_run(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path / "run", "env.horizon=70")
    loop.parts.preferences.save(tmp_path / "labels.npz")
    loop.release()
    stored = Preferences.load(tmp_path / "labels.npz")
    assert environment(tmp_path / "labels.npz", None, stored)["horizon"] == 70
    assert environment(tmp_path / "labels.npz", "pointmass", stored)["horizon"] == 50, "another by its name"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"_target_": "tests.test_labelling.Talkative"}, r"env\._target_=tests.test_labelling.Talkative is not among"),
        ({"_target_": "envs.pointmass.PointMass", "horizon": "${oc.env:HOME}"}, "holds plain values only"),
        ({"_target_": "envs.pointmass.PointMass", "horizon": "50"}, "is not what"),
        ({"_target_": "envs.gym.GymEnv", "id": "payload:Env-v0"}, "is outside what"),
    ],
)
def test_an_environment_that_a_strangers_file_asks_for_is_held_against_the_list(
    env: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"labels.npz: .*{message}"):
        environment(Path("labels.npz"), None, Preferences({"env_config": env}))


def test_an_own_environment_of_a_file_is_drawn_when_it_is_trusted() -> None:
    env = {"_target_": "tests.test_labelling.Talkative"}
    assert environment(Path("labels.npz"), None, Preferences({"env_config": env}), ["tests.test_labelling"]) == env


def test_an_environment_that_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    make_store(tmp_path).close()
    chosen = settings(
        tmp_path / "labels.sqlite3", draw=True, env={"_target_": "envs.pointmass.PointMass", "horizon": 0}
    )
    with pytest.raises(ValueError, match=r"cannot be drawn: .*horizon"):
        Service(chosen)


class Talkative(PointMass):
    """Prints more than a pipe holds, and cannot step in one direction."""

    def __init__(self) -> None:
        print("a simulator says its name")
        super().__init__()

    def step(self, action: np.ndarray) -> Any:
        print("and what it does" * 10_000)
        if action[0] == -1:
            raise KeyError("no such way")
        return super().step(action)


@pytest.mark.slow
def test_an_environment_that_prints_and_one_that_fails_leave_the_page_standing(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0)
    env = PointMass()
    env.reset(seed=0)
    states = np.stack([env.get_state()] * 2)
    moves = [np.full((2, 2, 2), way, np.float32) for way in (1, -1, 1)]
    store.post([Pair(f"k{i}", drawing.pack(states, actions)) for i, actions in enumerate(moves)])
    service = Service(settings(store.path, draw=True, env={"_target_": "tests.test_labelling.Talkative"}))
    try:
        client = Client(service)
        for number, status, begin in ((1, 200, b""), (2, 500, b"a clip cannot be drawn: KeyError"), (3, 200, b"")):
            got, content, _ = client.request("GET", f"/api/clip?number={number}&repeat=false")
            assert got == status and content.startswith(begin), content[:200]
    finally:
        service.close()
        store.close()


# ----------------------------------------------------------------------------------------------------- the teacher


def test_a_person_is_a_teacher_and_no_second_journal_is_kept(tmp_path: Path) -> None:
    query = recorded(3)
    teacher = HumanTeacher({"_target_": "envs.pointmass.PointMass"}, "go", repeats=0.0, undo_seconds=0.0, size=64)
    journal = AnswerJournal(tmp_path / "answers.jsonl")
    teacher.open(tmp_path, STEPS)
    try:
        store, service = teacher._open()
        teacher.post(query)
        for label in (1.0, None, 0.5):
            give(store, "anna", label)
        client = Client(service)
        status, clip, _ = client.request("GET", "/api/clip?number=2&repeat=false")
        assert status == 200 and clip[4:8] == b"ftyp"
        answer = ask(teacher, query, journal)
        assert answer.prefers_first.tolist() == [1.0, 0.5, 0.5] and answer.given.tolist() == [True, False, True]
        again = ask(teacher, query, journal)
        assert torch.equal(again.prefers_first, answer.prefers_first), "a resumed run asks nobody twice"
        assert (tmp_path / "answers.jsonl").read_bytes() == b""
        assert teacher.metrics()["teacher/anna/answers"] == 3.0
    finally:
        teacher.close(complete=False)
