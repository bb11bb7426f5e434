"""Starting the page's server, keeping it alive, and telling it what training does."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKEN = "PBRL_LABELLING_TOKEN"  # environment variable: a token that stays the same over restarts
SHORTEST_TOKEN = 16  # characters


class Service:
    """The server of one store's page.

    Args:
        settings: what `pbrl.labelling.server` reads, without token and port; plain JSON values.
        port: 0: any free one, and the same again if the server has to be restarted.

    Raises:
        ValueError: if the page cannot be served here; the message says why, in a line.
    """

    def __init__(self, settings: Mapping[str, Any], port: int = 0) -> None:
        missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"the labelling page needs {' and '.join(missing)}: pip install 'pbrl[human]'")
        token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
        if not re.fullmatch(rf"[A-Za-z0-9._~-]{{{SHORTEST_TOKEN},}}", token):  # browsers rewrite others behind a #
            raise ValueError(f"{TOKEN} must have at least {SHORTEST_TOKEN} characters of A-Z, a-z, 0-9 and . _ ~ -")
        self._settings = {**settings, "token": token}
        self._told: dict[str, str] = {}  # what a restarted server must hear again
        self.host, self.port = str(settings["host"]), port
        self._start()

    @property
    def link(self) -> str:
        """The page's address, with the token where browsers do not send it."""
        host = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"http://{host}:{self.port}/#{self._settings['token']}"

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != TOKEN}
        root = str(Path(__file__).parent.parent.parent)  # where pbrl and envs lie, installed or not
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pbrl.labelling.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for training
        )
        self._write(json.dumps({**self._settings, "port": self.port}))
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        said: dict[str, Any] = json.loads(answer) if answer else {"error": "its server ended at once"}
        if "error" in said:
            self.close()
            raise ValueError(f"the labelling page cannot be opened: {said['error']}")
        self.port = said["port"]
        for line in self._told.values():
            self._write(line)

    def keep_alive(self) -> None:
        """Start the server again if it was killed: same address, same token."""
        if self._process.poll() is not None:
            self.close()
            self._start()

    def tell(self, **said: Any) -> None:
        """Say what training does; see `pbrl.labelling.server.Labelling.hear`. Lost if the server is dead."""
        line = json.dumps(said)
        self._told[next(iter(said)) + str(said.get("point", {}).get("step", ""))] = line
        self._write(line)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it was killed: `keep_alive` starts another
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not yet written to a dead server
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
