"""Refuses settings that do not fit each other, the number of workers, or the task."""

from __future__ import annotations

from spikerl.algos import ALGOS, AlgoConfig
from spikerl.algos.base import CriticsConfig
from spikerl.algos.bc import BCConfig
from spikerl.algos.bcq import BCQConfig
from spikerl.algos.decision_transformer import DecisionTransformerConfig
from spikerl.algos.offpolicy import DelayConfig, OfflineConfig, ReplayConfig
from spikerl.algos.ppo import PPOConfig
from spikerl.config.run import RunConfig
from spikerl.distributed.launchers import ranked
from spikerl.envs.config import EnvConfig
from spikerl.errors import BadRequest
from spikerl.machine import cores
from spikerl.models.actor_config import ActorConfig, CareBNConfig
from spikerl.models.precision import PrecisionConfig
from spikerl.models.sequence import SequenceConfig
from spikerl.snn.conv import ConvConfig
from spikerl.types import Task


def check_shares(run: RunConfig, algo: AlgoConfig, world_size: int) -> None:
    """Refuse sizes that cannot be divided among the workers."""
    most = max(64, 4 * cores()) * run.nnodes
    if world_size > most and not ranked():  # a file must not start thousands of processes
        raise BadRequest("world_size", world_size, f"give at most {most} here")
    num_envs = run.num_envs or world_size
    if num_envs % world_size and run.resume:
        remedy = f"the run's {num_envs} environments cannot be shared out evenly; give a divisor"
        raise BadRequest("world_size", world_size, remedy)
    if num_envs % world_size:
        remedy = f"give a multiple of world_size={world_size}"
        raise BadRequest("num_envs", num_envs, remedy)
    if run.scaling == "strong" and algo.batch_size < world_size:
        remedy = f"algo.batch_size={algo.batch_size} has fewer rows than that; use fewer workers"
        raise BadRequest("world_size", world_size, remedy)
    if isinstance(algo, ReplayConfig) and algo.replay_capacity < num_envs:
        remedy = f"give at least num_envs={num_envs}, a row for each environment"
        raise BadRequest("algo.replay_capacity", algo.replay_capacity, remedy)
    batches = world_size if run.scaling == "weak" else 1
    if isinstance(algo, PPOConfig) and algo.batch_size * batches > algo.rollout_steps:
        remedy = f"algo.rollout_steps={algo.rollout_steps} has no such batch for each worker"
        raise BadRequest("algo.batch_size", algo.batch_size, remedy)
    if isinstance(algo, PPOConfig) and algo.rollout_steps % num_envs:
        remedy = f"give a multiple of num_envs={num_envs}"
        raise BadRequest("algo.rollout_steps", algo.rollout_steps, remedy)


def check_actions(algo: AlgoConfig, task: Task) -> None:
    """Refuse an algorithm that does not learn the task's kind of actions."""
    if task.kind not in ALGOS.part(algo).acts:
        fit = [
            name
            for name, (config, learner) in ALGOS.options.items()
            if task.kind in learner.acts and not issubclass(config, OfflineConfig)
        ]
        remedy = f"the actions of {task.env_id} are {task.kind}; use algo={' or '.join(fit)}"
        raise BadRequest("algo", algo.name, remedy)


def check_image(actor: ActorConfig, task: Task) -> None:
    """Refuse observations whose height and width are not the dimensions that the actor expects."""
    config, shape = actor.actor, task.obs_shape
    if not isinstance(config, ConvConfig) or len(shape) == 1:  # flat: it shows no layout
        return
    size, first = tuple(config.image), config.channels_first
    fits = {False: shape[:2] == size, True: shape[-2:] == size}
    if not fits[first] and fits[not first]:
        remedy = f"observations are {shape}; give {str(not first).lower()}"
        raise BadRequest("actor.channels_first", str(first).lower(), remedy)
    if not fits[first]:
        which = "last" if first else "first"
        remedy = f"observations are {shape}; height and width must be their {which} two numbers"
        raise BadRequest("actor.image", config.image, remedy)


def check_dataset(run: RunConfig, algo: AlgoConfig) -> None:
    """Refuse an offline algorithm without a dataset, and a dataset with any other."""
    offline = isinstance(algo, OfflineConfig)
    if offline and not run.dataset and not run.resume:
        remedy = f"algo={algo.name} learns from recorded transitions; give a folder of `spikerl"
        raise BadRequest("dataset", None, f"{remedy} collect`")
    if run.dataset and not offline:
        parts = ALGOS.options.items()
        fit = [name for name, (config, _) in parts if issubclass(config, OfflineConfig)]
        remedy = f"algo={algo.name} learns from steps of its own; use algo={' or '.join(fit)}"
        raise BadRequest("dataset", run.dataset, remedy)


def check_together(algo: AlgoConfig, actor: ActorConfig) -> None:
    """Refuse an algorithm and an actor, or a neuron's settings, that do not fit each other."""
    neuron = actor.neuron
    if neuron and neuron.surrogate_slope_end is not None and not neuron.slope_moves:
        remedy = f"surrogate={neuron.surrogate} has no slope; give null, or another surrogate"
        raise BadRequest("neuron.surrogate_slope_end", neuron.surrogate_slope_end, remedy)
    if isinstance(algo, PPOConfig) and actor.encoder and actor.encoder.name == "poisson":
        remedy = "ppo needs an action's probability, which random spikes hide; use population"
        raise BadRequest("encoder", "poisson", remedy)
    if isinstance(algo, PPOConfig) and isinstance(actor.actor, CareBNConfig):
        remedy = "ppo compares two passes, which batch moments set apart; use actor=popsan"
        raise BadRequest("actor", "care_bn", remedy)
    if isinstance(algo, BCQConfig) and isinstance(actor.actor, CareBNConfig):
        remedy = "its moments are of observations, and bcq's actor sees actions too; use popsan"
        raise BadRequest("actor", "care_bn", remedy)


def check_critics(algo: AlgoConfig, precision: PrecisionConfig) -> None:
    """Refuse a precision that differs for critics only, where the algorithm has none."""
    if precision.actor == "fp32" != precision.critic and not isinstance(algo, CriticsConfig):
        remedy = f"algo={algo.name} has no critics, whose format it is; leave it out"
        raise BadRequest("precision", precision.name, remedy)


def check_sequence(
    algo: AlgoConfig, actor: ActorConfig, env: EnvConfig, precision: PrecisionConfig
) -> None:
    """Refuse a network over sequences without the algorithm that trains one, and the reverse; also
    a scale of rewards or a precision that the algorithm does not use.
    """
    name = actor.actor.name
    learns = isinstance(algo, DecisionTransformerConfig)
    if isinstance(actor.actor, SequenceConfig) != learns:
        fits = "spikeformer or transformer" if learns else "decision_transformer"
        remedy = f"algo={algo.name} learns from single steps; use algo={fits}"
        if learns:
            remedy = f"algo={algo.name} learns from sequences; use actor={fits}"
        raise BadRequest("actor", name, remedy)
    if isinstance(algo, BCConfig) and env.reward_scale != 1.0:
        raise BadRequest("env.reward_scale", env.reward_scale, "bc reads no reward; give 1")
    if not learns:
        return
    if env.reward_scale != 1.0:
        remedy = "returns to go are divided by algo.return_scale; give 1"
        raise BadRequest("env.reward_scale", env.reward_scale, remedy)
    if precision.name != "fp32":
        raise BadRequest("precision", precision.name, f"actor={name} learns in fp32 alone")


def why_no_graphs(
    run: RunConfig, algo: AlgoConfig, actor: ActorConfig, world_size: int
) -> BadRequest | None:
    """The reason why a round of updates cannot run as one CUDA graph, or None."""
    if not ALGOS.part(algo).has_graphs:
        fit = [name for name, (_, learner) in ALGOS.options.items() if learner.has_graphs]
        remedy = f"graphs are of {', '.join(fit)}; use kernel=triton alone"
        return BadRequest("algo", algo.name, remedy)
    if actor.neuron and actor.neuron.slope_moves:
        remedy = "a graph keeps the slope that it was recorded with; use kernel=triton alone"
        return BadRequest("neuron.surrogate_slope_end", actor.neuron.surrogate_slope_end, remedy)
    if world_size > 1:
        remedy = "a graph holds no exchange between workers; use kernel=triton alone"
        return BadRequest("world_size", world_size, remedy)
    if run.plugins:
        remedy = "a graph keeps what their parts compute in Python; use kernel=triton alone"
        return BadRequest("plugins", run.plugins, remedy)
    assert isinstance(algo, ReplayConfig)
    together = max(int(algo.update_interval * algo.updates_per_step + 1e-6), 1)
    delay = algo.policy_delay if isinstance(algo, DelayConfig) else 1
    if together < 2 * delay - 1:  # no round of algo.policy_delay updates is sure to be whole
        remedy = f"give {2 * delay - 1} updates or more at once, or use kernel=triton alone"
        return BadRequest("algo.update_interval", algo.update_interval, remedy)
    return None
