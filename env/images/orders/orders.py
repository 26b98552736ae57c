"""A database of orders, in memory, that lets in who knows its password.

POST / with `Authorization: Bearer PASSWORD` adds an order and answers 201; without it, 401.
GET / tells how many orders there are and how many were refused.

Variables that a manifest may set:
  PASSWORD      the password (required)
  PORT          where it listens (default 8080)
"""

import hmac
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

counts = {"orders": 0, "refused": 0}
lock = threading.Lock()


class Orders(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Tell the counts."""
        self.answer(200)

    def do_POST(self):
        """Take an order."""
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        given = self.headers.get("Authorization", "").encode()
        welcome = hmac.compare_digest(given, b"Bearer " + os.environb[b"PASSWORD"])
        with lock:
            counts["orders" if welcome else "refused"] += 1
        self.answer(201 if welcome else 401)

    def answer(self, status):
        """Answer with the counts."""
        with lock:
            body = json.dumps(counts).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Stay silent."""


def main():
    """Serve until SIGTERM."""
    if "PASSWORD" not in os.environ:
        raise SystemExit("orders: PASSWORD is not set")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Orders)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("orders listens", flush=True)
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
