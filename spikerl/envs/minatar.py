"""The games of MinAtar (Young and Tian, 2019, arXiv:1903.03176), whose package is an extra."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from minatar.gym import BaseEnv

from spikerl.envs.snapshot import Restorable, Snapshot

FIXED = ("random", "channels", "action_map")  # fields that no step changes, or kept separately
MOST = 1 << 20  # bound of any count or position in a restored game


class MinAtar(BaseEnv, Restorable):  # type: ignore[misc]  # the package has no types
    """A MinAtar game whose reset clears the last action. MinAtar repeats the last action with
    probability 0.1, which would otherwise carry over from one episode to the next.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.game.last_action = 0
        obs, info = super().reset(seed=seed, options=options)
        return obs, info

    def inner_state(self) -> Snapshot:
        """`mersenne`: the generator's words and its position. `game`: all else, as JSON."""
        mersenne = self.game.random.get_state(legacy=False)["state"]
        words = np.append(mersenne["key"].astype(np.int64), mersenne["pos"])
        text = json.dumps(self._fields(), default=lambda number: number.tolist())
        return {"mersenne": words, "game": np.frombuffer(text.encode(), np.uint8).copy()}

    def restore_inner(self, state: Snapshot) -> None:
        """Restore; ValueError if it is not a state of this game, which is then unchanged."""
        words = state["mersenne"]
        if not (words[:-1] >> 32 == 0).all() or not 0 <= words[-1] <= 624:
            raise ValueError("the snapshot's random state is none")
        try:
            own, given = self._fields(), json.loads(bytes(state["game"]))
        except RecursionError:
            raise ValueError("the snapshot's game is nested too deep") from None
        if not isinstance(given, dict) or own.keys() != given.keys():
            raise ValueError("the snapshot is of another game")
        values = {name: _like(value, given[name], name) for name, value in own.items()}
        self.game.last_action = values.pop("last_action")
        vars(self.game.env).update(values)
        generator = type(self.game.random)(0)
        mersenne = {"key": words[:-1].astype(np.uint32), "pos": int(words[-1])}
        generator.set_state({"bit_generator": "MT19937", "state": mersenne})
        self.game.random = self.game.env.random = generator

    def _fields(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self.game.env).items() if name not in FIXED}
        return {"last_action": self.game.last_action, **own}


def _like(own: Any, given: Any, name: str) -> Any:
    """`given` as a new value for a field that now holds `own`: a number, a map of numbers, or a
    list of objects of numbers or None; ValueError if it does not fit.
    """
    if isinstance(own, np.ndarray):
        rows = given if isinstance(given, list) and _numbers(given, 2) else []
        width = own.shape[1]
        whole = [row for row in rows if isinstance(row, list) and len(row) == width]
        fits = len(rows) == len(whole) == len(own) and not any(None in row for row in whole)
        given = np.array(given, own.dtype) if fits else own
    elif isinstance(own, list):
        fits = _numbers(given, 2)
    else:
        fits = isinstance(own, bool) is isinstance(given, bool) and _numbers(given, 0)
    if not fits:
        raise ValueError(f"the snapshot's {name} is not a state of it")
    return given


def _numbers(given: Any, depth: int) -> bool:
    if isinstance(given, list):
        return depth > 0 and all(each is None or _numbers(each, depth - 1) for each in given)
    return isinstance(given, bool | int | float) and abs(given) <= MOST
