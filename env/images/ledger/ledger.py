"""The ledger: moves one coin after the other between two accounts in SQLite, and says so after each commit.

python3 ledger.py           move coins until the end, one line of JSON for each that is booked
python3 ledger.py kill      kill -9 the process that moves coins, from another process of its container

Variables that a manifest may set:
  DATABASE      the file (default /data/ledger.db)
  PAUSE         seconds between two coins (default 0.01)
"""

import json
import os
import pathlib
import signal
import sqlite3
import sys
import time

DATABASE = os.environ.get("DATABASE", "/data/ledger.db")
PAUSE = float(os.environ.get("PAUSE", "0.01"))
START = 1_000_000


def connect():
    """Open the database; a commit is on the disk before it returns."""
    connection = sqlite3.connect(DATABASE, isolation_level=None, timeout=30)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def serve():
    """Make the accounts if there are none, then move coins, each in a transaction of its own."""
    database = connect()
    database.execute("BEGIN IMMEDIATE")
    database.execute("CREATE TABLE IF NOT EXISTS account (name TEXT PRIMARY KEY, coins INTEGER)")
    database.execute("CREATE TABLE IF NOT EXISTS booking (number INTEGER PRIMARY KEY, at REAL)")
    database.executemany("INSERT OR IGNORE INTO account VALUES (?, ?)", [("till", START), ("bank", 0)])
    database.execute("COMMIT")
    print(json.dumps({"found": database.execute("SELECT count(*) FROM booking").fetchone()[0]}), flush=True)
    while True:
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE account SET coins = coins - 1 WHERE name = 'till'")
        number = database.execute("INSERT INTO booking (at) VALUES (?)", [time.time()]).lastrowid
        database.execute("UPDATE account SET coins = coins + 1 WHERE name = 'bank'")
        database.execute("COMMIT")
        print(json.dumps({"booked": number}), flush=True)
        time.sleep(PAUSE)


def kill():
    """SIGKILL the process that moves coins: by its command line, since it may have any number."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        words = (folder / "cmdline").read_bytes().split(b"\0")
        if b"/app/ledger.py" in words and b"kill" not in words:
            os.kill(int(folder.name), signal.SIGKILL)
            print("killed")
            return
    sys.exit("found nobody who moves coins")


if __name__ == "__main__":
    kill() if sys.argv[1:] == ["kill"] else serve()
