"""The page in a real Chromium: keys, buttons, tabs, raters, narrow screens, and a whole run taught by key presses."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from envs.pointmass import PointMass
from pbrl.labelling.store import Taken
from pbrl.labelling.teacher import HumanTeacher, pair_keys
from pbrl.launch.build import build
from pbrl.records.evaluation import episode
from tests.conftest import config
from tests.people import CHROMIUM, Command, Person, answers, browser, wait_for
from tests.test_labelling import STEPS, recorded
from tests.test_learning import EPISODES, LEVEL, p_value, random_returns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # playwright's own event loop
]
CUT_OFF = re.compile(r"net::ERR_(CONNECTION|EMPTY|CONTENT_LENGTH)")  # no connection; none of a reply; a part of it
TASK = 'go <b>up</b> & "stay"<script>alert(1)</script>'


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[HumanTeacher]:
    """A page with four questions and no training."""
    made = HumanTeacher({"_target_": "envs.pointmass.PointMass"}, TASK, repeats=0.0, undo_seconds=0.0, size=64)
    made.open(tmp_path, STEPS)
    made.post(recorded(4))
    yield made
    made.close(complete=False)


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Any]:
    with browser(tmp_path) as context:
        yield context


def test_keys_undo_skip_equal_reload_and_a_second_tab(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    link = teacher._open()[1].link
    person = Person(chromium, link, tmp_path)
    assert person.question() == {"number": 1, "repeat": False}
    assert person.page.inner_text("#task") == TASK and not person.page.query_selector("#task b")
    assert not person.page.evaluate("document.getElementById('clip').paused")
    person.press("ArrowLeft")
    assert person.question()["number"] == 2
    person.press("ArrowUp")
    person.question()
    person.press("u")
    assert person.question()["number"] == 2, "the pair is there again"
    person.press("ArrowDown")
    assert person.question()["number"] == 3
    assert answers(tmp_path) == [(1, "you", 1.0, 0), (2, "you", None, 0)]
    person.page.reload()
    assert person.question()["number"] == 3, "not lost and not asked twice"
    second = Person(chromium, link, tmp_path)
    assert second.question()["number"] == 3, "one rater, one question"
    person.press("ArrowRight")
    second.press("ArrowLeft")  # too late
    assert "undo it first" in second.page.inner_text("#notice")
    assert second.question()["number"] == 4
    for key, speed in (("1", 0.5), ("3", 2), ("2", 1)):
        second.page.keyboard.press(key)
        assert second.page.evaluate("document.getElementById('clip').playbackRate") == speed
    second.page.keyboard.press(" ")
    assert second.page.evaluate("document.getElementById('clip').paused")
    second.page.click("button.half[data-do=right]")
    wait_for(lambda: len(answers(tmp_path)) == 4)
    keys = pair_keys(recorded(4))
    taken = teacher._open()[0].use(keys, 1, 10)
    assert taken == [Taken(keys[0], 1.0), Taken(keys[1], None), Taken(keys[2], 0.0), Taken(keys[3], 0.0)]
    wait_for(lambda: person.page.is_visible("#idle"))
    assert person.complaints == [] and second.complaints == []
    own = link.partition("#")[0]
    assert all(url.startswith((own, "blob:", "data:")) for url in person.requests), "no request to anywhere else"
    assert not any(link.rpartition("#")[2] in url for url in person.requests), "the token is in no address"


def test_space_presses_the_button_in_focus(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    person = Person(chromium, teacher._open()[1].link, tmp_path)
    for count, key in enumerate((" ", "Enter"), 1):
        assert person.question()["number"] == count
        person.page.focus(".keys [data-do=left]")
        person.page.keyboard.press(key)
        wait_for(lambda count=count: len(answers(tmp_path)) == count)
    assert not person.page.evaluate("paused")
    person.page.keyboard.press(" ")
    assert person.page.evaluate("paused"), "no button is in focus any more"


def test_two_raters_on_wide_and_narrow_screens(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    link = teacher._open()[1].link
    anna, ben = (Person(chromium, link, tmp_path, name, width) for name, width in (("anna", 1100), ("ben", 360)))
    assert {anna.question()["number"], ben.question()["number"]} == {1, 2}
    for person in (anna, ben):
        assert person.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        boxes = [person.page.locator(f".keys [data-do={name}]").bounding_box() for name in ("left", "right", "undo")]
        assert all(box["height"] >= 44 and box["y"] + box["height"] < 760 for box in boxes), "for thumbs, in sight"
    for person in (anna, ben, anna, ben):
        person.judge()
    raters = teacher._open()[0].raters()
    assert {name: numbers["answers"] for name, numbers in raters.items()} == {"anna": 2.0, "ben": 2.0}
    assert all(numbers["task_agreement"] == 1.0 for numbers in raters.values())
    assert anna.complaints == [] and ben.complaints == []


def test_questions_that_arrive_flash_in_the_title(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    teacher.post(recorded(1, seed=5))
    person = Person(chromium, teacher._open()[1].link, tmp_path)
    person.judge()
    wait_for(lambda: person.page.is_visible("#idle"))
    person.page.evaluate("document.hasFocus = () => false")
    teacher.post(recorded(2, seed=6))
    wait_for(lambda: person.page.title() != "Teach the robot", 20)
    person.judge()
    assert person.page.title() == "Teach the robot"


def test_a_wrong_token_is_said_on_the_page(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    person = Person(chromium, teacher._open()[1].link + "x", tmp_path)
    wait_for(lambda: "wrong token" in person.page.inner_text("#notice"))
    assert not person.page.is_visible("#ask")


def test_nobody_judges_what_he_cannot_see(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    chromium.route("**/api/clip?number=1&*", lambda route: route.fulfill(status=500, body="a clip cannot be drawn"))
    chromium.route("**/api/clip?number=2&*", lambda route: route.fulfill(content_type="video/mp4", body="no film"))
    person = Person(chromium, teacher._open()[1].link, tmp_path)
    for what, number in (("cannot be drawn", 1), ("cannot play", 2)):
        wait_for(lambda what=what: what in person.page.inner_text("#notice"))
        for key in ("ArrowLeft", "ArrowUp", "ArrowRight"):
            person.press(key)
        assert len(answers(tmp_path)) == number - 1
        person.press("ArrowDown")
        assert answers(tmp_path)[-1] == (number, "you", None, 0)
    assert person.question()["number"] == 3
    assert not person.page.is_visible("#notice")


# A browser that loads nothing before `play()`, as some on telephones; and one that then refuses to play.
ON_DEMAND = """
  const media = HTMLMediaElement.prototype, { set } = Object.getOwnPropertyDescriptor(media, "src"), start = media.play;
  Object.defineProperty(media, "src", { get() { return this.kept || ""; }, set(url) { this.kept = this.next = url; } });
  media.play = function () {
    if (this.next) set.call(this, this.next);
    this.next = null;
    return start.call(this);
  };
"""
NEVER = "media.play = () => Promise.reject(new Error('not now'));"


def test_a_browser_that_loads_nothing_before_it_plays_shows_the_clips(
    teacher: HumanTeacher, chromium: Any, tmp_path: Path
) -> None:
    chromium.add_init_script(ON_DEMAND)
    person = Person(chromium, teacher._open()[1].link, tmp_path)
    assert person.question(10)["number"] == 1
    assert not person.page.evaluate("document.getElementById('clip').paused")
    person.page.keyboard.press(" ")
    person.press("ArrowLeft")
    assert person.question(10)["number"] == 2
    assert person.page.evaluate("document.getElementById('clip').paused"), "as it was left"
    assert person.complaints == []


def test_a_clip_that_never_loads_may_be_skipped(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    chromium.add_init_script(ON_DEMAND + NEVER)
    person = Person(chromium, teacher._open()[1].link, tmp_path)
    wait_for(lambda: "cannot play" in person.page.inner_text("#notice"), 60)
    person.press("ArrowLeft")
    assert answers(tmp_path) == []
    person.press("ArrowDown")
    assert answers(tmp_path) == [(1, "you", None, 0)]
    assert person.complaints == []


def test_the_end_is_said_though_questions_are_left(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    person = Person(chromium, teacher._open()[1].link, tmp_path)
    person.press(person.question() and "ArrowLeft")
    person.question()
    teacher._open()[1].tell(status={"phase": "finished"})
    wait_for(lambda: person.page.is_visible("#idle"))
    assert person.page.inner_text("#doing") == "Training has finished. Thank you."
    teacher.close(complete=True)
    for key in ("u", "ArrowLeft"):  # nobody is there any more
        person.press(key)
    assert len(answers(tmp_path)) == 1


def test_what_does_not_arrive_is_said(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    person = Person(chromium, teacher._open()[1].link, tmp_path)
    person.question()
    teacher.close(complete=False)
    person.page.keyboard.press("ArrowLeft")
    wait_for(lambda: "what you pressed has not arrived" in person.page.inner_text("#notice"))
    assert "Training has ended, or it was stopped" in person.page.inner_text("#notice")


class BadLine(ThreadingHTTPServer):
    """Hands requests on to the page's server at `own`, and breaks off the first reply to each of `left` half way."""

    def __init__(self, own: str, *left: str) -> None:
        super().__init__(("127.0.0.1", 0), HandOn)
        self.own, self.left = own, set(left)


class HandOn(BaseHTTPRequestHandler):
    server: BadLine

    def do_GET(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Origin")}
        connection = http.client.HTTPConnection(self.server.own, timeout=60)
        connection.request(self.command, self.path, asked or None, headers)
        reply = connection.getresponse()
        body = reply.read()
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            self.send_header(name, value)
        self.end_headers()
        path = urlsplit(self.path).path
        self.wfile.write(body[: len(body) // 2] if path in self.server.left else body)
        self.server.left.discard(path)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_reply_that_breaks_off_is_asked_for_again(teacher: HumanTeacher, chromium: Any, tmp_path: Path) -> None:
    link = teacher._open()[1].link
    with BadLine(urlsplit(link).netloc, "/api/clip", "/api/answer") as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        try:
            person = Person(chromium, link.replace(line.own, f"127.0.0.1:{line.server_port}"), tmp_path)
            assert person.question()["number"] == 1, "the clip is fetched again"
            person.press("ArrowLeft")
            assert person.question()["number"] == 2
            assert answers(tmp_path) == [(1, "you", 1.0, 0)], "counted once"
            assert not person.page.is_visible("#notice")
            person.page.close()
        finally:
            line.shutdown()
    assert line.left == set()
    assert len(person.complaints) == 2 and all(CUT_OFF.search(said) for said in person.complaints), person.complaints


def test_a_run_taught_by_key_presses_learns(chromium: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = Command(
        "experiment=teach-pointmass", f"run_dir={run_dir}", "threads=1", "eval.episodes=2", "teacher.size=64"
    )
    try:
        person = Person(chromium, command.link(), run_dir)
        begin, pressed = time.monotonic(), 0
        while command.process.poll() is None:
            if person.shown() is not None:
                person.judge()
                pressed += 1
                if pressed in (
                    8,
                    20,
                ):  # in the middle of a session: the run starts the page again, the browser finds it
                    os.kill(command.servers()[0], signal.SIGKILL)
            else:
                time.sleep(0.1)
            assert time.monotonic() < begin + 900, command.output
        assert command.wait() == 0, command.output
    finally:
        if command.process.poll() is None:
            command.process.kill()
    assert all(CUT_OFF.search(said) for said in person.complaints), person.complaints
    given = [row for row in answers(run_dir) if not row[3]]
    assert len(given) == 30 and pressed >= 30
    shutil.rmtree(run_dir / "checkpoints" / "unused", ignore_errors=True)
    cfg, choices = config(f"resume={run_dir}", "teacher=oracle")
    loop = build(cfg, choices, [])
    seeds = range(5_000_000, 5_000_000 + EPISODES)
    env = PointMass()
    learned = np.array([episode(loop.agent, env, seed)[0] for seed in seeds])
    loop.release()
    chance = random_returns(seeds)
    print(f"\nreturn {learned.mean():.1f}, random {chance.mean():.1f}")
    assert p_value(learned, chance, np.random.default_rng(0)) < LEVEL
