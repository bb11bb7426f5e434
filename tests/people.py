"""People in a real browser, for tests: they look at the page and press keys."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.faults.people import LINK, ask_page
from pbrl.labelling import server
from pbrl.labelling.store import LabelStore

ROOT = Path(__file__).parent.parent
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]


class Command:
    """A command of this project running beside the test; its output is kept."""

    def __init__(self, *arguments: str, module: str = "pbrl.train") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def link(self, seconds: float = 120.0) -> str:
        """The page's address, once it is printed."""
        wait_for(lambda: LINK.search(self.output) or self.process.poll() is not None, seconds, lambda: self.output)
        found = LINK.search(self.output)
        assert found is not None, self.output
        return found.group()

    def wait(self, seconds: float = 600.0) -> int:
        """Its exit status."""
        status = self.process.wait(seconds)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def servers(self) -> list[int]:
        """Process numbers of the servers that it has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(c) for c in children if b"pbrl.labelling.server" in Path(f"/proc/{c}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, what: Callable[[], str] = lambda: "") -> Any:
    """What the condition returns, once that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what()}"
        time.sleep(0.02)
    return value


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A real Chromium with a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder / "profile"), executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        try:
            yield context
        finally:
            context.close()


class Person:
    """One rater at the page. Whatever the browser complains about is in `complaints`."""

    def __init__(self, context: Any, link: str, run_dir: Path, name: str | None = None, width: int = 1100) -> None:
        self.store = run_dir / "labelling.sqlite3"
        self.link = link if name is None else link.replace("/#", f"/?rater={name}#")
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.set_viewport_size({"width": width, "height": 760})
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.link)

    def shown(self) -> dict[str, Any] | None:
        """The question whose clip is playing: number, repeat; None while there is none."""
        found = self.page.evaluate(
            "visibleSince !== null && !busy && shown !== null ? {...shown} : null"  # globals of page.js
        )
        return found if found is None else dict(found)

    def question(self, seconds: float = 60.0) -> dict[str, Any]:
        """The question on the screen, once its clip plays."""
        return wait_for(self.shown, seconds, lambda: self.page.inner_text("body"))  # type: ignore[no-any-return]

    def press(self, key: str) -> None:
        """Press a key and wait until the server has counted it."""
        self.page.keyboard.press(key)
        wait_for(lambda: not self.page.evaluate("busy"), 60)

    def returns(self, number: int) -> tuple[float, float]:
        """The task's own returns of a question's segments."""
        with sqlite3.connect(self.store) as store:
            (text,) = store.execute("SELECT returns FROM question WHERE id = ?", (number,)).fetchone()
        first, second = json.loads(text)
        return first, second

    def judge(self) -> str:
        """Answer what is shown by the task's own return; the key that was pressed."""
        shown = self.question()
        first, second = self.returns(shown["number"])
        if shown["repeat"]:
            first, second = second, first
        key = "ArrowLeft" if first > second else "ArrowRight" if second > first else "ArrowUp"
        self.press(key)
        return key


def answers(run_dir: Path) -> list[tuple[Any, ...]]:
    """question, rater, label, repeat of all answers that stand, in the order given."""
    with sqlite3.connect(run_dir / "labelling.sqlite3") as store:
        return store.execute(
            "SELECT question, rater, label, repeat FROM answer WHERE undone IS NULL ORDER BY given"
        ).fetchall()


class AnsweredPage:
    """In place of `pbrl.labelling.service.Service`: the same server, in a thread and without drawing, and with somebody
    at the page who answers by the task's own returns, over HTTP as the page does."""

    def __init__(self, settings: Mapping[str, Any], port: int = 0) -> None:
        self.store = LabelStore(settings["path"], settings["reviews"], settings["lease"], settings["repeats"])
        bound = server.bind("127.0.0.1", port)
        self.port = bound.getsockname()[1]
        self.link = f"http://127.0.0.1:{self.port}/#0123456789abcdef"
        chosen = {**settings, "token": "0123456789abcdef", "draw": False}
        clips = server.Clips(self.store, settings["env"], settings["size"], False)
        self.app = server.Labelling(chosen, self.store, clips, server.own_hosts("127.0.0.1", self.port))
        self._server = server.web_server(self.app)
        self._left = threading.Event()
        self._threads = [
            threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}),
            threading.Thread(target=self._answer),
        ]
        for thread in self._threads:
            thread.start()

    def _answer(self) -> None:
        ask = ask_page(self.link)
        while not self._left.wait(0.02):
            state = ask("state")
            while (question := state["question"]) is not None and not self._left.is_set():
                ((text,),) = self.store._all("SELECT returns FROM question WHERE id = ?", question["number"])
                first, second = json.loads(text)
                label = float(second > first if question["repeat"] else first > second)
                state = ask("answer", answer=f"{question}", **question, label=label, seconds=1.0)

    def tell(self, **said: Any) -> None:
        """What training does is of no interest."""

    def keep_alive(self) -> None:
        """It lives."""

    def close(self) -> None:
        self._left.set()
        self._threads[1].join()
        self._server.should_exit = True
        self._threads[0].join()
        self.store.close()
