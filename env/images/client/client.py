"""One request every so often, for a while; each outcome is a line of JSON on standard output.

python3 client.py URL --period SECONDS --seconds SECONDS [--timeout SECONDS] [--keep-alive all|none|half] [--pool CONNECTIONS]

Knocks until the first answer, so that a Service that was made a moment ago is there on this node. From then on
requests start on a fixed schedule, whatever the ones before them do (an open loop): a slow answer delays
no other request. With keep-alive a request takes, from a pool, the connection that has rested longest, as a
gateway does; without, it opens one of its own. Nothing is tried twice. Ends early, with everything reported, on SIGTERM.
"""

import argparse
import collections
import http.client
import json
import signal
import sys
import threading
import time
from urllib.parse import urlsplit


def main():
    """Read the arguments and run the schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--period", type=float, default=0.02)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--timeout", type=float, default=2.0)
    parser.add_argument("--keep-alive", choices=("all", "none", "half"), default="half")
    parser.add_argument("--pool", type=int, default=6)
    arguments = parser.parse_args()
    url = urlsplit(arguments.url)
    path = url.path or "/"
    resting = collections.deque()
    kept = 0
    lock = threading.Lock()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())

    def connect():
        return http.client.HTTPConnection(url.hostname, url.port or 80, timeout=arguments.timeout)

    def take():
        nonlocal kept
        with lock:
            if resting and kept >= arguments.pool:
                return resting.popleft()
            kept += 1
        return None

    def give_back(connection, usable):
        nonlocal kept
        with lock:
            if usable:
                resting.append(connection)
            else:
                kept -= 1

    def request(number, keep):
        record = {"n": number, "start": time.time(), "keep_alive": keep}
        connection = take() if keep else None
        record["reused"] = connection is not None
        connection = connection or connect()
        usable = False
        try:
            began = time.perf_counter()
            connection.request("GET", path, headers={} if keep else {"Connection": "close"})
            response = connection.getresponse()
            body = response.read()
            record["seconds"] = time.perf_counter() - began
            record["status"] = response.status
            record |= json.loads(body) if response.status == 200 else {"error": f"HTTP {response.status}"}
            usable = keep and not response.will_close
        except (OSError, http.client.HTTPException, ValueError) as error:
            record["seconds"] = time.time() - record["start"]
            record["error"] = type(error).__name__
        if not usable:
            connection.close()
        if keep:
            give_back(connection, usable)
        with lock:
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()

    def knock():
        connection = connect()
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    while not knock() and not ended.wait(0.1):
        pass
    print(json.dumps({"begin": time.time()}), flush=True)
    threads = []
    began = time.perf_counter()
    for number in range(int(arguments.seconds / arguments.period)):
        if ended.wait(max(0.0, began + number * arguments.period - time.perf_counter())):
            break
        keep = arguments.keep_alive == "all" or (arguments.keep_alive == "half" and number % 2 == 0)
        thread = threading.Thread(target=request, args=(number, keep), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads[-200:]:
        thread.join(arguments.timeout * 2)
    print(json.dumps({"end": time.time()}), flush=True)


if __name__ == "__main__":
    main()
