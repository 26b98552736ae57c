"""Prints what its container was given, a line of JSON for each: at the start, and whenever it changes.

python3 mirror.py NAME|PATH …

A NAME is an environment variable, a PATH (it begins with /) a file, or a folder of which each file is told.
Looks ten times a second; what is not valid UTF-8 is told by its length. Goes on until SIGTERM.
"""

import json
import os
import signal
import stat
import sys
import time

PERIOD = 0.1


def files(path):
    """The files at a path, without those that a volume keeps for itself (`..data` and what it points to)."""
    if not os.path.isdir(path):
        return [path] if os.path.exists(path) else []
    inside = [os.path.join(path, name) for name in sorted(os.listdir(path)) if not name.startswith("..")]
    return [name for name in inside if os.path.isfile(name)]


def value(content):
    """Text as it is, anything else by its length."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"{len(content)} bytes"


def given(wanted):
    """What is there now: by variable or file, its value and, of a file, its mode."""
    found = {}
    for one in wanted:
        if not one.startswith("/"):
            found[one] = {"value": os.environ.get(one)}
            continue
        for path in files(one):
            try:
                with open(path, "rb") as file:
                    found[path] = {"value": value(file.read()), "mode": stat.filemode(os.fstat(file.fileno()).st_mode)}
            except OSError as error:
                found[path] = {"value": None, "error": error.strerror}
    return found


def main():
    """Tell what is there, then every change."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    told = {}
    while True:
        now = given(sys.argv[1:])
        for name in told.keys() - now.keys():
            now[name] = {"value": None}
        for name, one in now.items():
            if told.get(name) != one:
                print(json.dumps({"at": time.time(), "name": name, **one}), flush=True)
        told = now
        if signal.sigtimedwait({signal.SIGTERM}, PERIOD):
            sys.exit(143)


if __name__ == "__main__":
    main()
