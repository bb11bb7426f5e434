"""A judge to start from: `python -m teachers.example_server --port 8000`, then train with

    python -m pbrl.train env=pointmass teacher=http teacher.url=http://127.0.0.1:8000/label

It prefers the segment that spends less energy. Replace `judge` by your own, a vision-language model for instance.
Only this machine can reach it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGEST_REQUEST = 256 * 2**20  # bytes


def judge(first: dict[str, Any], second: dict[str, Any]) -> float | None:
    """1 if the first segment is better, 0 the second, 0.5 if they are equally good, None to skip the pair.

    Each segment has `obs` [H][obs_dim], `actions` [H][act_dim] and, if the teacher sends them, `frames` (base64 PNG).
    """
    energies = [sum(a * a for action in segment["actions"] for a in action) for segment in (first, second)]
    if energies[0] == energies[1]:
        return 0.5
    return 1.0 if energies[0] < energies[1] else 0.0


class Handler(BaseHTTPRequestHandler):
    """Answers POST requests of teachers.http, repeated ones from memory."""

    timeout = 60  # seconds a client may take to send its request
    known: dict[str, list[float | None]] = {}  # noqa: RUF012  # answers by request id, shared by all connections
    judging: dict[str, threading.Lock] = {}  # noqa: RUF012  # by request id: one that is repeated meanwhile waits

    def do_POST(self) -> None:
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= LARGEST_REQUEST:
                raise ValueError(f"a request of {length} bytes")
            request = json.loads(self.rfile.read(length))
            name = request["id"]
            with self.judging.setdefault(name, threading.Lock()):
                if name not in self.known:
                    self.known[name] = [judge(pair["first"], pair["second"]) for pair in request["pairs"]]
            self._reply(200, {"answers": self.known[name]})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._reply(400, {"error": f"not a request of teachers.http: {error!r}"})

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        with contextlib.suppress(ConnectionError):  # who asked has left; he is answered from memory when he asks again
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m teachers.example_server", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: %(default)s)")
    with ThreadingHTTPServer(("127.0.0.1", parser.parse_args(arguments).port), Handler) as server:
        print(f"judging at http://127.0.0.1:{server.server_port}/label; stop with Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
