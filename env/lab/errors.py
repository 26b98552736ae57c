"""The errors a person can meet. Each says what happened, on what, and what to do next."""


class LabError(Exception):
    """Base of every error that the lab raises on purpose.

    Args:
        what: What happened, on what, in one sentence.
        cure: The next step to take, in one sentence.
    """

    def __init__(self, what: str, cure: str = "") -> None:
        self.what = what
        self.cure = cure
        super().__init__(f"{what} {cure}".strip())


class MissingPrerequisite(LabError):
    """The machine lacks something that the lab needs: root, a kernel feature, a program, memory, disk."""


class Occupied(LabError):
    """Something else holds what the lab needs: a port, an address range, the lab itself."""


class BuildFailed(LabError):
    """A binary, an image or a download could not be made."""


class NotRunning(LabError):
    """The lab, or the part of it that was asked for, is not running."""


class Unhealthy(LabError):
    """A component started but did not become well within its limit."""


class TimedOut(LabError):
    """A state that was waited for did not come within the limit."""


class CheckFailed(LabError):
    """A lesson's check read the cluster's or the broker's state and found something else."""
