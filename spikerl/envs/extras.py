"""Tasks from packages that are optional extras of this program."""

from __future__ import annotations

from importlib.util import find_spec

import gymnasium as gym

# By the beginning of a task's id: the module that it needs, and the extra that installs it.
EXTRAS = {
    "ALE/": ("ale_py", "atari"),
    "MinAtar/": ("minatar", "minatar"),
    **dict.fromkeys(("BipedalWalker", "CarRacing", "LunarLander"), ("Box2D", "box2d")),
}
GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


def needs(env_id: str) -> tuple[str, str] | None:
    """The module and the extra that a task needs; None if it needs none."""
    return next((extra for start, extra in EXTRAS.items() if env_id.startswith(start)), None)


def why_missing(env_id: str) -> str | None:
    """Which module a task lacks and how to install it; None if nothing is missing."""
    needed = needs(env_id)
    if needed is None or find_spec(needed[0]) is not None:
        return None
    module, extra = needed
    return f"{module} is not installed; pip install 'spikerl[{extra}]'"


def register_ale(env_id: str) -> None:
    """Register Atari's games if this is one: importing ale_py does so. The logger mode keeps ALE
    from printing a banner on stderr.
    """
    if env_id.startswith("ALE/"):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def register_minatar() -> None:
    """Register MinAtar's games under its own names; Gymnasium no longer loads package plugins."""
    for game in GAMES:
        name = game.title().replace("_", "")
        for version, minimal in enumerate((False, True)):
            gym.register(
                f"MinAtar/{name}-v{version}",
                entry_point="spikerl.envs.minatar:MinAtar",
                kwargs={"game": game, "use_minimal_action_set": minimal},
            )


register_minatar()
