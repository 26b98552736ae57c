"""The shell lines of a notebook: what `!kubectl …` prints, whole and in order."""

from __future__ import annotations

import subprocess
import sys


def use_pipes() -> None:
    """Let `!command` read its command through a pipe until the command ends.

    Jupyter reads it through a pseudo-terminal, and on a busy machine the last line can be lost there.
    Does nothing outside IPython.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return

    def system(command: str) -> None:
        process = subprocess.Popen(
            shell.var_expand(command, depth=1),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            for line in process.stdout:
                print(line, end="")
        except KeyboardInterrupt:
            process.terminate()
            raise
        finally:
            shell.user_ns["_exit_code"] = process.wait()

    shell.system = system
