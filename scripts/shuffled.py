"""Pendulum and CartPole with rewards in random order: a control from which nothing can be learned.

`PYTHONPATH=scripts spikerl train env=gym env.id=shuffled:ShuffledPendulum-v0 ...` trains on it;
`spikerl eval run=RUN env_id=Pendulum-v1` shows the result on the real task. CartPole's reward is 1
at every step, and shuffling would change nothing; here it is -1 where the pole falls and 0
elsewhere, and then shuffled.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym

HELD = 2000  # rewards, as many as ten episodes of Pendulum have


class Shuffled(gym.Wrapper[Any, Any, Any, Any]):
    """Each step returns a random one of `HELD` stored rewards, in whose place it stores its own."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.held: list[SupportsFloat] = []

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        obs, rew, terminated, truncated, info = self.env.step(action)
        self.held.append(rew)
        if len(self.held) > HELD:
            i = int(self.np_random.integers(HELD))
            self.held[i], rew = self.held[-1], self.held[i]
            self.held.pop()
        else:
            rew = self.held[int(self.np_random.integers(len(self.held)))]
        return obs, rew, terminated, truncated, info


def make(**kwargs: Any) -> gym.Env[Any, Any]:
    return Shuffled(gym.make("Pendulum-v1", **kwargs))


def make_cartpole(**kwargs: Any) -> gym.Env[Any, Any]:
    return Shuffled(gym.make("CartPole-v1", sutton_barto_reward=True, **kwargs))


gym.register("ShuffledPendulum-v0", make, max_episode_steps=200)
gym.register("ShuffledCartPole-v0", make_cartpole, max_episode_steps=500)
