"""The ways a run is refused, hindered or stopped by design, and the statuses it exits with."""

# 75 and 130: stopped on request before the end; resume goes on.
DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130


class BadRequest(ValueError):
    """The request was wrong: the program ends with status 2 and this line, nothing created."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(key, value, remedy)

    def __str__(self) -> str:
        key, value, remedy = self.args
        return f"{key}={'null' if value is None else value}: {remedy}"


class DiskError(OSError):
    """A disk refused what all workers needed; each of them raises the same."""


class NonFinite(RuntimeError):
    """A NaN or an infinity was met and stopped before it reached the weights."""


class EnvironmentFailed(RuntimeError):
    """An environment raised, died, hung, or returned what its spaces do not say."""
