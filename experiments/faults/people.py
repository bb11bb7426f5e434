"""Somebody at the labelling page of whatever run a file's last printed link belongs to: a script that speaks HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LINK = re.compile(r"http://\S+/#\S+")
LABELS = (1.0, 0.0, 1.0, 0.5, 0.0, None)  # of pair number 0, 1, …, and so on: not by chance, so a run can be repeated


def ask_page(link: str) -> Callable[..., dict[str, Any]]:
    """Asks the server as the page does: `ask("state")`, `ask("answer", answer=…, …)`."""
    base, _, token = link.partition("/#")

    def ask(name: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{base}/api/{name}",
            json.dumps({"rater": "you", **body}).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return dict(json.load(reply))

    return ask


def answer_open(link: str) -> None:
    """Answer all that is asked now."""
    ask = ask_page(link)
    state = ask("state")
    while (question := state["question"]) is not None:
        label = LABELS[question["number"] % len(LABELS)]
        name = f"{question['number']}-{question['repeat']}"
        state = ask("answer", answer=name, **question, label=label, seconds=1.0)


@contextmanager
def somebody(output: Path) -> Iterator[None]:
    """Within the block a process answers at the last page whose link is in this file."""
    pid = os.fork()
    if not pid:
        while os.getppid() != 1:
            try:
                links = LINK.findall(output.read_text(errors="replace"))
                if links:
                    answer_open(links[-1])
            except (OSError, http.client.HTTPException):  # no file, or nobody there any more
                pass
            time.sleep(0.05)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
