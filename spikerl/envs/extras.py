"""Tasks of packages that are extras of this program."""

from __future__ import annotations

from importlib.util import find_spec

import gymnasium as gym

# What an id begins with: the module that such tasks need, and the extra that brings it.
EXTRAS = {
    "ALE/": ("ale_py", "atari"),
    "MinAtar/": ("minatar", "minatar"),
    **dict.fromkeys(("BipedalWalker", "CarRacing", "LunarLander"), ("Box2D", "box2d")),
}
GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")


def needs(env_id: str) -> tuple[str, str] | None:
    """The module and the extra of such a task; None where it needs none."""
    return next((extra for start, extra in EXTRAS.items() if env_id.startswith(start)), None)


def why_missing(env_id: str) -> str | None:
    """What installs the package that such a task lacks; None where nothing is missing."""
    needed = needs(env_id)
    if needed is None or find_spec(needed[0]) is not None:
        return None
    module, extra = needed
    return f"{module} is not installed; pip install 'spikerl[{extra}]'"


def register_ale(env_id: str) -> None:
    """Atari's games, if this is one: ale_py registers them where it is imported, and else says who
    it is on stderr.
    """
    if env_id.startswith("ALE/"):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def register_minatar() -> None:
    """Under the names that MinAtar has for them: Gymnasium no longer asks packages for theirs."""
    for game in GAMES:
        name = game.title().replace("_", "")
        for version, minimal in enumerate((False, True)):
            gym.register(
                f"MinAtar/{name}-v{version}",
                entry_point="spikerl.envs.minatar:MinAtar",
                kwargs={"game": game, "use_minimal_action_set": minimal},
            )


register_minatar()
