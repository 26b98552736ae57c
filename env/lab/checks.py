"""What a lesson verifies, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lab.errors import CheckFailed, LabError, TimedOut

T = TypeVar("T")


def check(claim: str, holds: object, found: object = "") -> None:
    """Print what was verified.

    Args:
        claim: What should hold, as a sentence without its full stop.
        holds: Whether it does.
        found: What was found, told where it does not hold.

    Raises:
        CheckFailed: It does not hold.
        LabError: It is many values, and not one.
    """
    try:
        held = bool(holds)
    except ValueError:
        raise LabError(
            f"Cannot check that {claim}: a {type(holds).__name__} holds many values.", "Write .all() or .any() after it."
        ) from None
    if not held:
        raise CheckFailed(f"✗ {claim}.", f"Found instead: {found}" if str(found) else "")
    print(f"✓ {claim}")


def wait(
    what: str,
    condition: Callable[[], T],
    limit: float = 60.0,
    every: float = 0.1,
    despite: type[Exception] | tuple[type[Exception], ...] = (),
) -> T:
    """Wait until a condition holds and return what it returned.

    Args:
        what: What is waited for, told when it does not come.
        condition: Called until it returns something true.
        limit: Seconds to wait at most.
        every: Seconds between two calls.
        despite: Errors of the condition that mean "not yet".

    Raises:
        LabError: The condition is not a function.
        TimedOut: It did not hold within the limit.
    """
    if not callable(condition):
        raise LabError(f"Cannot wait for {what}: {condition!r} is not a function.", "Write lab.wait(what, lambda: …, limit=seconds).")
    end = time.monotonic() + limit
    while True:
        try:
            found = condition()
        except despite as error:
            seen = error
        else:
            if found:
                return found
            seen = found
        if time.monotonic() > end:
            raise TimedOut(
                f"Waited {limit:.0f} s for {what}; it did not come (last seen: {seen!r}).",
                "Look at the cluster with `lab status`, then run the cell again.",
            )
        time.sleep(every)
