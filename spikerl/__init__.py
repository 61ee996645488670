"""Spiking reinforcement learning: `spikerl train`, and `load_policy`."""

from __future__ import annotations

# Without `typing`: nothing is imported before `python -m` has left the current folder (__main__).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from spikerl.models.policy import Policy
    from spikerl.runs.policies import load_policy

    __version__: str

__all__ = ["Policy", "__version__", "load_policy"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Lazily, so that the command line composes and explains configs without importing torch.
    if name == "__version__":
        from importlib.metadata import version

        return version("spikerl")
    if name not in __all__:
        raise AttributeError(f"module 'spikerl' has no attribute {name!r}")
    from spikerl.models.policy import Policy
    from spikerl.runs.policies import load_policy

    return Policy if name == "Policy" else load_policy
