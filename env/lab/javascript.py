"""The JavaScript kernel: `python -m lab.javascript FILE`, which is Deno's kernel with every output in its place.

Deno 2.9 sends what a cell prints, and its last value, beside the message that the cell is done, and now and then after it
(1 in 8 values on a busy machine). Whoever executes a notebook then misses an output. So this stands between Jupyter and
Deno: when a cell is done it runs one more that prints a mark and has it as its value, and passes "done" on when both marks
have come. Outputs overtake neither mark: each kind is sent in order, though a late one may name the mark's cell as its own.
And of a cell that it cannot parse, Deno tells nobody but the client that asked: the error is published here.
https://jupyter-client.readthedocs.io/en/stable/messaging.html
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.connect import write_connection_file
from jupyter_client.session import DELIM, Session

MARK = "\N{END OF TRANSMISSION BLOCK}"
FLUSH = f"console.log({json.dumps(MARK)}); {json.dumps(MARK)}"
SHOWN = r'"\x17"'
"""The mark as Deno shows it when it is a value."""
UNPARSED = "This cell could not be parsed."
LIMIT = 10.0
"""Seconds to wait for the marks once their cell was answered: a reader's own `console` may print none."""
CHANNELS = ("shell", "control", "stdin")


def end_with_parent() -> None:
    """Make the kernel end this process if its parent ends (Linux, prctl(2))."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Kernel:
    """Passes messages between Jupyter, which it serves on the ports of `connection`, and a Deno kernel of its own."""

    def __init__(self, connection: dict[str, Any], folder: Path) -> None:
        key, scheme = connection["key"].encode(), connection.get("signature_scheme", "hmac-sha256")
        file, own = write_connection_file(str(folder / "deno.json"), ip="127.0.0.1", key=key, signature_scheme=scheme)
        self.session = Session(key=key, signature_scheme=scheme)
        context = zmq.Context()
        self.front, self.back = {}, {}
        for name in CHANNELS:
            self.front[name] = context.socket(zmq.ROUTER)
            self.front[name].bind(f"{connection['transport']}://{connection['ip']}:{connection[f'{name}_port']}")
            self.back[name] = context.socket(zmq.DEALER)
            self.back[name].setsockopt(zmq.IDENTITY, b"lab")
            self.back[name].connect(f"tcp://127.0.0.1:{own[f'{name}_port']}")
        self.heartbeat = context.socket(zmq.REP)
        self.heartbeat.bind(f"{connection['transport']}://{connection['ip']}:{connection['hb_port']}")
        self.published = context.socket(zmq.PUB)
        self.published.bind(f"{connection['transport']}://{connection['ip']}:{connection['iopub_port']}")
        self.heard = context.socket(zmq.SUB)
        self.heard.setsockopt(zmq.SUBSCRIBE, b"")
        self.heard.connect(f"tcp://127.0.0.1:{own['iopub_port']}")
        self.deno = subprocess.Popen(
            [Path(sys.executable).with_name("deno"), "jupyter", "--quiet", "--kernel", "--conn", file],
            env={**os.environ, "NO_COLOR": "1"},
            preexec_fn=end_with_parent,
        )
        self.clients: dict[str, list[bytes]] = {name: [] for name in CHANNELS}
        self.waiting: deque[list[bytes]] = deque()
        self.request: dict[str, Any] | None = None
        self.held: list[tuple[zmq.Socket, list[bytes]]] = []
        self.reply: dict[str, Any] | None = None
        self.failed = False
        self.mark, self.missing, self.until = "", set(), 0.0

    def pass_on(self, name: str, frames: list[bytes]) -> None:
        """Pass a client's message on, and remember whose it is: Deno answers without saying to whom."""
        start = frames.index(DELIM)
        self.clients[name] = frames[:start]
        self.back[name].send_multipart(frames[start:])

    def header(self, frames: list[bytes], parent: bool = False) -> dict[str, Any]:
        """The header of a message, or its parent's."""
        return json.loads(frames[frames.index(DELIM) + (3 if parent else 2)])

    def ask(self, kind: str, content: dict[str, Any]) -> str:
        """Ask Deno something that no client asked; returns the message's id."""
        return self.session.send(self.back["shell"], kind, content)["header"]["msg_id"]

    def connect(self) -> None:
        """Wait until Deno answers, and what it publishes is heard."""
        while self.deno.poll() is None:
            asked = self.ask("kernel_info_request", {})
            while self.heard.poll(1000):
                frames = self.heard.recv_multipart()
                if self.header(frames, parent=True).get("msg_id") == asked and b'"idle"' in frames[-1]:
                    while self.back["shell"].poll(200):
                        self.back["shell"].recv_multipart()
                    return

    def next(self) -> None:
        """Pass on the next request, if none is under way."""
        if self.request is None and self.waiting:
            frames = self.waiting.popleft()
            self.request = self.header(frames)
            self.pass_on("shell", frames)

    def release(self) -> None:
        """Say that the request is done, and that it failed, if nobody else did."""
        if self.reply and self.reply["status"] == "error" and not self.failed:
            error = {"ename": "SyntaxError", "evalue": UNPARSED, "traceback": [f"SyntaxError: {UNPARSED}"]}
            self.session.send(self.published, "error", error, parent={"header": self.request}, ident=b"error")
        for socket, frames in self.held:
            socket.send_multipart(frames)
        self.request, self.reply, self.failed, self.held, self.mark, self.missing = None, None, False, [], "", set()
        self.next()

    def release_if_complete(self) -> None:
        """Say that the request is done if it was answered and both marks have come."""
        if self.mark and self.reply and not self.missing:
            self.release()

    def answered(self, frames: list[bytes]) -> None:
        """A reply of Deno's on the shell channel."""
        if self.mark and self.header(frames, parent=True).get("msg_id") == self.mark:
            self.until = time.monotonic() + LIMIT
        elif self.header(frames)["msg_type"] == "execute_reply":
            self.held.append((self.front["shell"], self.clients["shell"] + frames))
            self.reply = json.loads(frames[frames.index(DELIM) + 5])
            self.release_if_complete()
        else:
            self.front["shell"].send_multipart(self.clients["shell"] + frames)

    def told(self, frames: list[bytes]) -> None:
        """Something that Deno published."""
        kind, parent = self.header(frames)["msg_type"], self.header(frames, parent=True).get("msg_id")
        content = json.loads(frames[frames.index(DELIM) + 5])
        idle = kind == "status" and content["execution_state"] == "idle"
        if self.mark and parent == self.mark:
            self.marked(kind, content, idle)
        elif idle and self.request and parent == self.request["msg_id"]:
            self.held.insert(0, (self.published, frames))
            if self.request["msg_type"] == "execute_request":
                self.until = float("inf")
                self.missing = {"stream", "execute_result", "status"}
                self.mark = self.ask("execute_request", {"code": FLUSH, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False, "stop_on_error": False})  # fmt: skip
            else:
                self.release()
        else:
            self.failed = self.failed or kind == "error"
            self.published.send_multipart(frames)

    def marked(self, kind: str, content: dict[str, Any], idle: bool) -> None:
        """Something that Deno published about the mark's cell: what is not of the mark belongs to the cell before."""
        if kind == "stream" and MARK in content["text"]:
            self.missing.discard(kind)
            content["text"] = content["text"].replace(f"{MARK}\n", "")
        elif kind == "execute_result" and content["data"].get("text/plain") == SHOWN:
            self.missing.discard(kind)
            content = {}
        elif kind == "error":
            self.missing.clear()
            content = {}
        if kind not in ("status", "execute_input") and content and content.get("text", "-"):
            self.session.send(self.published, kind, content, parent={"header": self.request}, ident=kind.encode())
        if idle:
            self.missing.discard("status")
        self.release_if_complete()

    def run(self) -> int:
        """Serve until Deno ends; returns its exit code."""
        self.connect()
        poller = zmq.Poller()
        for socket in (*self.front.values(), *self.back.values(), self.heard, self.heartbeat):
            poller.register(socket, zmq.POLLIN)
        while self.deno.poll() is None:
            ready = dict(poller.poll(200))
            for name in CHANNELS:
                if self.front[name] in ready:
                    frames = self.front[name].recv_multipart()
                    if name == "shell":
                        self.waiting.append(frames)
                    else:
                        self.pass_on(name, frames)
                if self.back[name] in ready:
                    frames = self.back[name].recv_multipart()
                    if name == "shell":
                        self.answered(frames)
                    else:
                        self.front[name].send_multipart(self.clients["control" if name == "control" else "shell"] + frames)
            if self.heartbeat in ready:
                self.heartbeat.send(self.heartbeat.recv())
            if self.heard in ready:
                self.told(self.heard.recv_multipart())
            if self.mark and time.monotonic() > self.until:
                self.release()
            self.next()
        return self.deno.returncode


def main() -> None:
    """Serve the connection file that is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as folder:
        kernel = Kernel(json.loads(Path(sys.argv[1]).read_text()), Path(folder))
        sys.exit(kernel.run())


if __name__ == "__main__":
    main()
