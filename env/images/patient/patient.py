"""The patient: a program that can be made ill, so that one sees what Kubernetes does about it.

python3 patient.py [serve]                     answers HTTP and, if GRPC_PORT is set, gRPC health checks
python3 patient.py allocate MIB MIB_PER_SECOND takes memory and keeps it
python3 patient.py check                       ends with 0 if HEALTH is "well", else with 1

Variables that a manifest may set:
  HEALTH      "well" (default), or "ill": HTTP answers 503, gRPC NOT_SERVING
  PORT        where HTTP listens (default 8080), "" for nowhere
  GRPC_PORT   where gRPC listens (default: nowhere)
  WORK        seconds of processor time that GET /work takes (default 0.025)

Requests:
  GET /live, GET /ready   how it is; each leaves a line of JSON on standard output
  GET /work               works, then says which Pod did
  GET /hang               from now on it answers nothing and does not heed SIGTERM, as a program in a deadlock
  GET /cgroup             what its own cgroup (v1 or v2) says of processor and memory
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

POD = os.environ.get("POD_NAME") or socket.gethostname()
WELL = os.environ.get("HEALTH", "well") == "well"
WORK = float(os.environ.get("WORK", "0.025"))
CGROUP = Path("/sys/fs/cgroup")
hanging = threading.Event()
forever = threading.Event()


def say(**record):
    """Leave a line of JSON, with the time."""
    sys.stdout.write(json.dumps({"time": time.time(), **record}) + "\n")
    sys.stdout.flush()


def number(path):
    """The number in a file of the cgroup, None for "max"."""
    text = (CGROUP / path).read_text().split()[0]
    return None if text == "max" else int(text)


def cgroup():
    """Processor and memory of the own cgroup: seconds, bytes, and how often it had to wait for its next period."""
    v2 = (CGROUP / "cgroup.controllers").exists()
    stat = dict(line.split() for line in (CGROUP / ("cpu.stat" if v2 else "cpu/cpu.stat")).read_text().splitlines())
    throttled = int(stat["throttled_usec"]) / 1e6 if v2 else int(stat["throttled_time"]) / 1e9
    used = int(stat["usage_usec"]) / 1e6 if v2 else int((CGROUP / "cpuacct/cpuacct.usage").read_text()) / 1e9
    quota = number("cpu.max" if v2 else "cpu/cpu.cfs_quota_us")
    return {
        "version": 2 if v2 else 1,
        "quota_us": None if quota in (None, -1) else quota,
        "used_seconds": used,
        "nr_periods": int(stat["nr_periods"]),
        "nr_throttled": int(stat["nr_throttled"]),
        "throttled_seconds": throttled,
        "memory": number("memory.current" if v2 else "memory/memory.usage_in_bytes"),
        "memory_limit": number("memory.max" if v2 else "memory/memory.limit_in_bytes"),
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
    }


class Patient(BaseHTTPRequestHandler):
    """One HTTP connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        """Answer, or don't."""
        path = self.path.partition("?")[0]
        if path == "/hang":
            hanging.set()
        if path in ("/live", "/ready"):
            say(probe=path[1:], answer=None if hanging.is_set() else 200 if WELL else 503)
        if hanging.is_set() and path not in ("/hang", "/cgroup"):
            forever.wait()
        if path == "/work":
            end = time.thread_time() + WORK
            while time.thread_time() < end:
                pass
        body = json.dumps(cgroup() if path == "/cgroup" else {"version": "v1", "pod": POD}).encode()
        self.send_response(200 if WELL else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Stay silent."""


class Server(ThreadingHTTPServer):
    """An HTTP server that takes no offence at a client that hangs up."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that hangs up is no error of the patient's."""


def frame(kind, flags, stream, content=b""):
    """One HTTP/2 frame (RFC 9113, section 4.1)."""
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def grpc(connection):
    """Answer every call on an HTTP/2 connection with a HealthCheckResponse (grpc.health.v1).

    Whatever is called is taken for Health/Check, so no header need be read.
    """
    data, headers, settings, ping, end_stream, end_headers, ack = 0, 1, 4, 6, 1, 4, 1
    status, content_type = b"\x88", b"\x0f\x10\x10application/grpc"
    message = b"\x08" + (b"\x01" if WELL else b"\x02")
    trailer = b"\x00\x0bgrpc-status\x010"
    with connection, connection.makefile("rb") as stream:
        stream.read(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
        connection.sendall(frame(settings, 0, 0))
        while len(head := stream.read(9)) == 9:
            kind, flags, number = head[3], head[4], int.from_bytes(head[5:], "big")
            content = stream.read(int.from_bytes(head[:3], "big"))
            if kind in (settings, ping) and not flags & ack:
                connection.sendall(frame(kind, ack, 0, content if kind == ping else b""))
            elif kind in (data, headers) and flags & end_stream:
                connection.sendall(
                    frame(headers, end_headers, number, status + content_type)
                    + frame(data, 0, number, b"\x00" + len(message).to_bytes(4, "big") + message)
                    + frame(headers, end_headers | end_stream, number, trailer)
                )


def serve_grpc(port):
    """Take gRPC connections, each in a thread of its own."""
    with socket.create_server(("", port)) as server:
        while True:
            threading.Thread(target=grpc, args=(server.accept()[0],), daemon=True).start()


def serve():
    """Serve until SIGTERM; in a deadlock, until SIGKILL."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if port := os.environ.get("PORT", "8080"):
        threading.Thread(target=Server(("", int(port)), Patient).serve_forever, daemon=True).start()
    if port := os.environ.get("GRPC_PORT"):
        threading.Thread(target=serve_grpc, args=(int(port),), daemon=True).start()
    say(event="start")
    signal.sigwait({signal.SIGTERM})
    say(event="SIGTERM")
    if hanging.is_set():
        forever.wait()
    os._exit(143)


def allocate(mebibytes, per_second):
    """Take memory step by step, keep it for ten minutes, and say all the while what the cgroup counts."""
    step = 2
    kept = []
    began = time.monotonic()
    for taken in range(0, mebibytes, step):
        say(taken=taken << 20, **cgroup())
        kept.append(b"\xff" * (step << 20))
        time.sleep(max(0.0, began + (taken + step) / per_second - time.monotonic()))
    for _ in range(1200):
        say(taken=mebibytes << 20, **cgroup())
        time.sleep(0.5)


def main():
    """Do what the first argument says."""
    command, *arguments = sys.argv[1:] or ["serve"]
    if command == "allocate":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        allocate(*map(int, arguments))
    elif command == "check":
        print("feels well" if WELL else "feels ill")
        sys.exit(not WELL)
    else:
        serve()


if __name__ == "__main__":
    main()
