"""The shop: answers each request with its version and the Pod that served it.

Variables that a manifest may set:
  WARM_UP       seconds before it listens, as a program that loads its catalogue does (default 0)
  WORK          seconds that a request takes (default 0.02)
  ON_SIGTERM    "exit" ends at once, as a program without a handler does where it isn't PID 1 (default);
                "drain" answers what is under way, asks clients to reconnect elsewhere, then ends
  DRAIN         seconds that draining may take at most (default 8)
  PORT          where it listens (default 8080)
  ENVIRONMENT   what it is told of where it runs; stands in each answer (default: not)
  ORDERS        the database that takes each order, e.g. http://orders:8080 (default: none)
  PASSWORD      the password of that database
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = os.environ.get("VERSION", "dev")
POD = os.environ.get("POD_NAME") or socket.gethostname()
WORK = float(os.environ.get("WORK", "0.02"))
ORDERS = os.environ.get("ORDERS")
TOLD = {name.lower(): os.environ[name] for name in ("ENVIRONMENT", "ORDERS") if name in os.environ}
QUIET = 1.0
"""Seconds without a connection after which draining is done: as long as kube-proxy may take to hear of it."""
draining = threading.Event()


def place_order():
    """Write one order to the database, if there is one; return what went wrong, or ""."""
    headers = {"Authorization": f"Bearer {os.environ.get('PASSWORD', '')}"}
    try:
        urllib.request.urlopen(urllib.request.Request(ORDERS, data=b"{}", headers=headers), timeout=2).close()
    except urllib.error.HTTPError as error:
        return f"the database says {error.code} {error.reason}"
    except OSError as error:
        return f"the database does not answer: {error}"
    return ""


class Shop(BaseHTTPRequestHandler):
    """GET / buys something; GET /ready says whether to send customers here; GET /client says where the request came from."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        """Answer one request."""
        answer = {"version": VERSION, "pod": POD, **TOLD}
        if self.path == "/client":
            answer |= {"client": self.client_address[0], "forwarded_for": self.headers.get("X-Forwarded-For")}
        if self.path != "/ready":
            time.sleep(WORK)
            if ORDERS and (wrong := place_order()):
                answer["error"] = wrong
        body = json.dumps(answer).encode()
        self.send_response(502 if "error" in answer else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if draining.is_set():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Stay silent: a line per request is the client's to keep."""


class Server(ThreadingHTTPServer):
    """Counts its open connections from the moment it accepts them, so that draining knows when it is done."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments):
        self.open = 0
        self.changed = threading.Condition()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        """Count one connection and hand it to a thread of its own."""
        with self.changed:
            self.open += 1
            self.changed.notify_all()
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        """Serve one connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.changed:
                self.open -= 1
                self.changed.notify_all()

    def drain(self, limit):
        """Go on serving until no connection has been open for QUIET seconds, `limit` seconds at most."""
        end = time.monotonic() + limit
        with self.changed:
            while self.changed.wait_for(lambda: self.open == 0, timeout=end - time.monotonic()):
                if not self.changed.wait_for(lambda: self.open > 0, timeout=QUIET):
                    break

    def handle_error(self, request, client_address):
        """A client that hangs up is no error of the shop's."""
        if not isinstance(sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def note_sigterm():
    """Leave the time of the SIGTERM where the kubelet puts it into the Pod's status."""
    try:
        with open("/dev/termination-log", "w") as file:
            json.dump({"sigterm": time.time()}, file)
    except OSError:
        pass


def main():
    """Warm up, listen, and end as ON_SIGTERM says.

    SIGTERM is blocked in every thread and fetched by this one: the first process of a container must ask for it,
    and of several threads Python's own handler may not wake the one that should run it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if signal.sigtimedwait({signal.SIGTERM}, float(os.environ.get("WARM_UP", "0"))):
        sys.exit(143)
    server = Server(("", int(os.environ.get("PORT", "8080"))), Shop)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    print(f"shop {VERSION} listens", flush=True)
    signal.sigwait({signal.SIGTERM})
    note_sigterm()
    if os.environ.get("ON_SIGTERM", "exit") == "exit":
        os._exit(143)
    draining.set()
    server.drain(float(os.environ.get("DRAIN", "8")))
    server.shutdown()
    print(f"shop {VERSION} ends with {server.open} connections open", flush=True)


if __name__ == "__main__":
    main()
