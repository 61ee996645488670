"""A dataset as the rows that an offline run learns from."""

from __future__ import annotations

import numpy as np

from spikerl.algos.base import Learner
from spikerl.algos.decision_transformer import DecisionTransformer
from spikerl.algos.replay import Replay
from spikerl.config.build import Config
from spikerl.envs.dataset import Dataset
from spikerl.envs.vector import Steps
from spikerl.errors import BadRequest, NonFinite
from spikerl.models.normalizer import RunningNorm, moments_of


def store_dataset(
    dataset: Dataset, config: Config, algo: Learner, replay: Replay, norm: RunningNorm, rank: int
) -> None:
    """Put worker `rank`'s share of the dataset into `replay`, and the moments of all of it into
    `norm`, unless that has those of another run.

    Transition k is stored for environment k mod N, as if N of them had recorded the dataset in
    turn; the fewer than N that are left over are not learned from. For an algorithm that learns
    from sequences, each environment gets a block of consecutive transitions, with returns to go
    and times in place of rewards and discounts; so an episode cut between two keeps its returns.
    """
    each, total = replay.width, config.num_envs
    sequences = algo if isinstance(algo, DecisionTransformer) else None
    scale, gamma = config.env.reward_scale, config.algo.gamma
    column = dataset.transitions // total
    try:
        replay.reserve(column * each)
    except MemoryError as error:
        needed = column * each * replay.rows.shape[1] * replay.rows.element_size() / 2**30
        remedy = f"its {dataset.transitions} transitions need {needed:.3g} GiB, which cannot be had"
        raise BadRequest("dataset", dataset.folder, remedy) from error
    first, end = 0, column * total
    normalises = config.algo.norm_interval is not None and not norm.count
    for episode in dataset.episodes():
        if normalises:
            norm.merge([moments_of(episode.obs[:-1])])  # the same on every worker
        steps = episode.steps()
        time = np.arange(len(steps.rew))
        number = first + time
        if sequences:
            env, rew = number // column, sequences.recorded(steps.rew, episode.whole)
        else:
            env, rew = number % total, steps.rew * scale
        mine = (env // each == rank) & (number < end)
        own = Steps(*(field[mine] for field in steps._replace(rew=rew)))
        try:
            replay.add(*own, discount=time[mine] if sequences else gamma)
        except NonFinite as error:
            remedy = f"{error}, with env.reward_scale={scale}"
            raise BadRequest("dataset", dataset.folder, remedy) from error
        first += len(steps.rew)
    if sequences:
        replay.interleave()
