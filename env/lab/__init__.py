"""The local Kubernetes cluster and Kafka brokers of the book, and what its notebooks import."""

from importlib import import_module

_PUBLIC = {
    "start": "topic",
    "Topic": "topic",
    "check": "checks",
    "wait": "checks",
    "LabError": "errors",
    "NotRunning": "errors",
    "TimedOut": "errors",
    "CheckFailed": "errors",
}


def __getattr__(name: str):
    """Load what a notebook asks for when it asks, so that the command `lab` starts fast."""
    if name == "plots":
        plots = import_module("lab.plots")
        plots.style()
        return plots
    if name in _PUBLIC:
        if name == "start":
            import_module("lab.plots").style()
        return getattr(import_module(f"lab.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "plots"])
