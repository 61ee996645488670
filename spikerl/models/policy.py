"""A trained policy as one artefact: actor, normaliser, action scaling, environment id, versions.

`policy.json` holds the plain data and `policy.safetensors` the tensors; loading either executes
nothing.

Shape legend   B batch, O observation entries, A action entries.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from spikerl import kernels, plugins
from spikerl.errors import BadRequest
from spikerl.files import json_bytes, read_bytes, read_json, write_atomic
from spikerl.kernels import reference
from spikerl.kernels.reference import Carried
from spikerl.machine import resolve_device, versions
from spikerl.models.actor import (
    ACTORS,
    Activity,
    Actor,
    ActorConfig,
    MLPActor,
    PopSANConfig,
    ProposalConfig,
    SequenceActor,
    SpikingActor,
)
from spikerl.models.compression import Compression
from spikerl.models.normalizer import RunningNorm
from spikerl.models.proposals import Proposer, build_policy
from spikerl.models.sequence import ConditionConfig, History, SequenceConfig
from spikerl.models.spikeformer import Spikeformer, SpikeformerConfig
from spikerl.schema import parse
from spikerl.snn.decoders import DECODERS
from spikerl.snn.encoders import ENCODERS
from spikerl.snn.neurons import NEURONS
from spikerl.types import MAX_EPISODE_STEPS, Contexts, Entry, Task, flat

SCHEMA = 3  # 2: weights are input-major; 3: neurons have a reset and a choice of surrogate
MAX_BYTES = 1 << 20  # of a policy.json; action bounds take most of it
MAX_TENSORS = 1 << 30
CHOICES = ("last", "best")  # of a run's policies
ACTOR_GROUPS = ("actor", "encoder", "neuron", "decoder")
_started_in = os.getpid()  # the process whose thread pool torch may have started


def parse_actor(data: dict[str, Any]) -> ActorConfig:
    """The actor's part of a config; a dense one has no spiking parts."""
    actor = ACTORS.parse(data.get("actor"))
    proposals = None
    if (given := data.get("proposals")) is not None:
        proposals = parse(ProposalConfig, given, key="proposals")
    if isinstance(actor, SequenceConfig):
        neuron = NEURONS.parse(data.get("neuron")) if isinstance(actor, SpikeformerConfig) else None
        conditioning = None
        if (given := data.get("conditioning")) is not None:
            conditioning = parse(ConditionConfig, given, key="conditioning")
        return ActorConfig(
            actor=actor, encoder=None, neuron=neuron, decoder=None, conditioning=conditioning
        )
    if not isinstance(actor, PopSANConfig):
        return ActorConfig(
            actor=actor, encoder=None, neuron=None, decoder=None, proposals=proposals
        )
    return ActorConfig(
        actor=actor,
        encoder=ENCODERS.parse(data.get("encoder")),
        neuron=NEURONS.parse(data.get("neuron")),
        decoder=DECODERS.parse(data.get("decoder")),
        proposals=proposals,
    )


class Policy:
    """Acts on raw observations; deterministic (a Poisson encoder draws from its own generator)."""

    def __init__(
        self,
        task: Task,
        config: ActorConfig,
        actor: Actor | SequenceActor | Proposer,
        norm: RunningNorm,
    ) -> None:
        self.task, self.config, self.network, self.norm = task, config, actor, norm
        self.device = next(actor.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.one_action = self._one_action()
        self.pid = _started_in
        self.trained_with: dict[str, str] = {}  # versions, where it was loaded from a file
        self.compression: Compression | None = None

    @property
    def actor(self) -> Actor:
        """The network that maps an observation to an action; a BadRequest where none does."""
        if isinstance(self.network, Proposer):
            remedy = "its policy chooses among proposed actions, which no network does alone"
            raise BadRequest("algo", "bcq", f"{remedy}; eval, collect and load_policy run it")
        if isinstance(self.network, SequenceActor):
            remedy = "its decisions depend on an episode's steps and rewards before, which no"
            remedy += " network sees alone; eval, collect and load_policy run it"
            raise BadRequest("actor", self.config.actor.name, remedy)
        return self.network

    def _one_action(self) -> kernels.cpu.OneAction | None:
        if not isinstance(self.network, SpikingActor) or self.task.choices is not None:
            return None
        return kernels.one_action(self.network.kernel, self.network, self.task)

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be pickled, nor pointers into the C++ library.
        return {**vars(self), "generator": self.generator.get_state(), "one_action": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pid = _started_in
        self.generator = torch.Generator(self.device)
        self.generator.set_state(state["generator"])
        self.network.kernel = kernels.here(self.network.kernel, str(self.device))
        self.one_action = self._one_action()

    def carried(self) -> Carried | History | None:
        """For the decisions of an episode, or of several side by side, where one depends on the one
        before; None where none does.
        """
        if isinstance(self.config.actor, SequenceConfig):
            assert self.config.conditioning is not None
            return History(self.config.actor.context, self.config.conditioning)
        return Carried() if self.network.carries else None

    def aim(self, target_return: float) -> None:
        """Ask for that return of an episode from now on, in the environment's units."""
        if (aimed := self.config.conditioning) is None:
            remedy = "its policy does not depend on a return that it aims at; leave it out"
            raise BadRequest("target_return", target_return, remedy)
        aimed = replace(aimed, target_return=target_return)
        self.config = replace(self.config, conditioning=aimed)

    def __call__(self, obs: Any, carried: Carried | History | None = None) -> np.ndarray:
        """Actions in the environment's units for one raw observation or a batch of them; where the
        environment's are dictionaries, such a one, or what it is flat.

        `carried`: of this episode's decisions, `policy.carried()` at its first, where that is not
        None; `carried.reward(rew)` takes what each of them earned, before the next. Discrete
        actions are numbers of int64, one (a scalar) for each observation.

        Raises TypeError for other than real numbers, ValueError for another shape than (*obs_shape)
        or (B, *obs_shape), a value that is not finite, or a missing `carried` or reward.
        """
        if self.pid != os.getpid():
            leave_thread_pool()
            self.pid, self.one_action = os.getpid(), self._one_action()  # its lock may be held
        if self.task.layout and not isinstance(obs, np.ndarray):
            obs = flat(self.task.layout, obs)
        obs = np.asarray(obs)
        if obs.dtype.kind not in "fiub":
            raise TypeError(f"obs holds {obs.dtype}; real numbers are needed")
        shape = self.task.obs_shape
        single = obs.shape == shape
        if not single and obs.shape[1:] != shape:
            raise ValueError(f"obs has shape {obs.shape}; expected {shape} or (B, *{shape})")
        if single and self.one_action is not None and not self.norm.far:
            one = self.one_action(obs.reshape(-1), self.norm.mean_std, self.norm.clip)
            if one is not None:
                return self.task.typed(one.reshape(self.task.act_shape))
        if not np.isfinite(obs).all():
            raise ValueError("obs holds a NaN or an infinity")
        act = self.act(obs.reshape(-1, self.task.obs_dim), self.generator, carried)
        act = self.task.to_env(act)
        return act[0] if single else act

    def predict(
        self,
        obs: np.ndarray,
        state: Carried | History | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Carried | History | None]:
        """The action, and what it leaves to the next one where that depends on it, else None.

        As Stable-Baselines3 and the tools around it call a policy. ValueError for
        `deterministic=False`: exploration belongs to the algorithm, and is not saved.
        """
        if not deterministic:
            raise ValueError("a saved policy has no exploration noise; give deterministic=True")
        state = self.carried() if state is None else state
        if state is not None and episode_start is not None:
            state.restart(torch.as_tensor(np.atleast_1d(episode_start), device=self.device))
        return self(obs, state), state

    @torch.no_grad()
    def act(
        self,
        obs_BO: np.ndarray,
        generator: torch.Generator,
        carried: Carried | History | None = None,
    ) -> np.ndarray:
        """Actions (B, A) in [-1, 1], or a value of each where they are discrete; `carried` as in a
        call.
        """
        obs, squash = self.observe(obs_BO), self.task.choices is None
        if isinstance(self.network, SequenceActor):
            if not isinstance(carried, History):
                raise ValueError("a decision depends on those before: give carried")
            act: Tensor = self.network(carried.see(obs, self.task.act_dim))[:, -1]
            carried.acted(act)
            return act.cpu().numpy()
        if isinstance(self.network, SpikingActor) and self.network.carries:
            if not isinstance(carried, Carried):
                raise ValueError("a decision depends on the one before: give carried")
            return reference.decide(self.network, obs, generator, carried, squash).cpu().numpy()
        if squash or isinstance(self.network, Proposer):
            return self.network(obs, generator).cpu().numpy()
        return self.network.mean(obs, generator).cpu().numpy()

    def observe(self, obs_BO: np.ndarray) -> Tensor:
        """What the actor sees of raw observations, (B, O)."""
        return self.norm.observe(obs_BO, self.device)

    def activity(self, seen_BO: Tensor, generator: torch.Generator) -> Activity | None:
        """How it fires on what `observe` gave; None where it is dense, or sees more than that."""
        if isinstance(self.network, MLPActor | SequenceActor):
            return None
        return self.network.activity(seen_BO, generator)

    @torch.no_grad()
    def activity_in(self, steps: Contexts) -> Activity | None:
        """How one over sequences fires on what its decisions saw; None where it is dense."""
        if not isinstance(self.network, Spikeformer):
            return None
        spikes, inside = self.network.counts(steps)
        tokens, none = int(steps.there.sum()), torch.zeros(1, dtype=torch.float64)
        samples = tokens * self.network.config.spike_steps
        return Activity([none, *spikes], inside, samples, tokens, encoder_spikes=False)

    def save(self, folder: Path) -> None:
        for name, content in self.files().items():
            write_atomic(folder / name, content)

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by name."""
        tensors = {f"actor.{k}": v.detach().clone() for k, v in self.network.state_dict().items()}
        tensors |= {f"norm.{k}": v for k, v in self.norm.state().items()}
        data = {
            "schema": SCHEMA,
            **task_data(self.task),
            "norm_clip": self.norm.clip,
            **_parts(self.config),
            "versions": self.trained_with or versions(),
        }
        if self.compression is not None:
            data["compression"] = asdict(self.compression)
        if needed := plugins.versions_of(self.config.parts()):
            data["plugins"] = needed
        return {"policy.safetensors": tensor_bytes(tensors), "policy.json": json_bytes(data)}


def leave_thread_pool() -> None:
    """Compute in one thread in a process that was forked: it has none of the threads that the pool
    of the process before consists of, and would wait for them without end.
    """
    global _started_in
    if os.getpid() != _started_in:
        _started_in = os.getpid()
        torch.set_num_threads(1)


def check_shapes(key: str, value: object, policy: Task, task: Task) -> None:
    """Refuse a policy whose observations or actions have other shapes than the task's."""
    (obs, act), (our_obs, our_act) = (_shapes(one) for one in (policy, task))
    if (obs, act) != (our_obs, our_act):
        remedy = f"its policy maps {obs} to {act} ({policy.env_id}),"
        raise BadRequest(key, value, f"{remedy} but {task.env_id} needs {our_obs} to {our_act}")


def _shapes(task: Task) -> tuple[str, str]:
    if task.choices is None:
        return str(task.obs_shape), str(task.act_shape)
    first = f" from {task.choices.start} on" if task.choices.start else ""
    return str(task.obs_shape), f"one of {task.act_dim} actions{first}"


def load_policy(
    run: str | Path, device: str | torch.device = "cpu", *, policy: str = "last"
) -> Policy:
    """The policy of a run folder: its final one, else that of its newest checkpoint.

    `policy`: last, or best, which had the highest evaluation return so far. `device`: auto, cpu,
    cuda or cuda:N. Raises BadRequest, a ValueError, for a device that is not there, and for a
    policy that is missing, foreign, damaged or inconsistent.
    """
    leave_thread_pool()
    choice = resolve_device(str(device).removesuffix(":0")).choice
    kernel = kernels.resolve(kernels.KernelConfig(name="auto", path=None), choice).choice
    folder = find_policy(Path(run), policy, key="run")
    return read_policy(folder, choice, key="run", kernel=kernel)


def find_policy(run: Path, policy: str = "last", *, key: str) -> Path:
    """The folder below `run` that holds the policy to use."""
    if policy not in CHOICES:
        raise BadRequest("policy", policy, f"give {' or '.join(CHOICES)}")
    folders, root = [run], run / "checkpoints"
    with suppress(OSError, ValueError):  # a name that cannot be one
        # What the link points at, as it may move meanwhile; without it, the newest that is there.
        folders.append(Path(os.path.realpath(root / "latest")))
        folders += sorted(root.glob("step_*"), reverse=True)
    if policy == "best":
        folders = [folder / "best" for folder in folders]
    for folder in folders:
        if os.path.isfile(folder / "policy.json"):  # False, too, for a name that is too long
            return folder
    remedy = "no policy there; give a run folder (it holds policy.json and policy.safetensors)"
    if policy == "best":
        remedy = "no best policy there: a run has one once it was evaluated; give policy=last"
    raise BadRequest(key, run, remedy)


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 as schema 3: all neurons were of one kind of reset and surrogate."""
    if isinstance(neuron := data.get("neuron"), dict):
        then = {"reset": "hard", "surrogate": "rect", "surrogate_slope": 2.0}
        data = {**data, "neuron": {**neuron, **then, "surrogate_slope_end": None}}
    return {**data, "schema": SCHEMA}


def task_data(task: Task) -> dict[str, Any]:
    """What `read_task` reads."""
    return {
        "env_id": task.env_id,
        "obs_shape": list(task.obs_shape),
        "act_shape": list(task.act_shape),
        "act_low": task.act_low.tolist(),
        "act_high": task.act_high.tolist(),
        "max_episode_steps": task.max_episode_steps,
        **_optional(task),
    }


def read_task(data: dict[str, Any]) -> Task:
    """A KeyError, TypeError, ValueError or OverflowError names the key that is not sound."""
    task = Task(
        str(data["env_id"]),
        tuple(int(n) for n in data["obs_shape"]),
        tuple(int(n) for n in data["act_shape"]),
        np.array(data["act_low"], np.float64),
        np.array(data["act_high"], np.float64),
        int(data["max_episode_steps"]),
        **_read_optional(data),
    )
    if not task.env_id.isprintable():
        raise ValueError("env_id, which cannot be printed")
    if min(*task.obs_shape, *task.act_shape, task.max_episode_steps, 1) < 1:
        raise ValueError("obs_shape, act_shape or max_episode_steps")
    if task.max_episode_steps > MAX_EPISODE_STEPS:
        raise ValueError(f"max_episode_steps, which is above {MAX_EPISODE_STEPS}")
    bounded = (task.act_dim if task.choices is None else 0,)
    if task.act_low.shape != bounded or task.act_high.shape != bounded:
        raise ValueError("act_low and act_high, which do not fit act_shape")
    if not np.isfinite([task.act_low, task.act_high]).all():
        raise ValueError("act_low or act_high, which are not finite")
    if not (task.act_low < task.act_high).all():
        raise ValueError("act_low and act_high, which leave no room")
    return task


def _parts(config: ActorConfig) -> dict[str, Any]:
    """The actor's groups, without the keys that only training reads."""
    parts = {group: part for group, part in asdict(config).items() if part is not None}
    actor = parts["actor"].items()
    return parts | {"actor": {k: v for k, v in actor if not k.startswith(("spike_cost", "prune"))}}


def _optional(task: Task) -> dict[str, Any]:
    """What only some tasks have."""
    layout = [[list(entry.path), list(entry.shape), entry.start] for entry in task.layout]
    every = {
        "act_dtype": task.act_dtype if task.act_dtype != "float32" else None,
        "act_choices": [task.choices.start, task.choices.stop] if task.choices else None,
        "obs_layout": layout,
        "env_kwargs": dict(task.env_kwargs),
        "env_wrappers": list(task.env_wrappers),
    }
    return {key: value for key, value in every.items() if value}


def _two(value: Any) -> tuple[int, int]:
    first, last = value
    if not all(type(n) is int and abs(n) < 1 << 62 for n in value):
        raise ValueError("act_choices, which are not whole numbers")
    return first, last


def _read_optional(data: dict[str, Any]) -> dict[str, Any]:
    layout = tuple(
        Entry(tuple(path), tuple(int(n) for n in shape), None if start is None else int(start))
        for path, shape, start in data.get("obs_layout", [])
    )
    obs_shape = [int(n) for n in data["obs_shape"]]
    if layout and [sum(entry.size for entry in layout)] != obs_shape:
        raise ValueError("obs_layout, which does not fit obs_shape")
    names = [name for entry in layout for name in entry.path]
    if not all(type(name) is int or (type(name) is str and name.isprintable()) for name in names):
        raise ValueError("obs_layout, whose names cannot be printed")
    if data.get("act_dtype", "float32") not in ("float16", "float32"):
        raise ValueError("act_dtype")
    kwargs, wrappers = data.get("env_kwargs", {}), data.get("env_wrappers", [])
    if not isinstance(kwargs, dict) or not isinstance(wrappers, list):
        raise ValueError("env_kwargs or env_wrappers")
    choices = range(*_two(data["act_choices"])) if "act_choices" in data else None
    if choices is not None and (len(choices) < 2 or data["act_shape"] != []):
        raise ValueError("act_choices, which are fewer than 2 or have a shape")
    return {
        "act_dtype": data.get("act_dtype", "float32"),
        "choices": choices,
        "layout": layout,
        "env_kwargs": kwargs,
        "env_wrappers": tuple(wrappers),
    }


def read_policy(
    folder: Path, device: str = "cpu", *, key: str, kernel: str = "reference"
) -> Policy:
    try:
        data = read_json(folder / "policy.json", MAX_BYTES)
        if "${" in json.dumps(data):
            raise ValueError("policy.json refers to something outside it")
        # Of its own: a file that is mapped ends the process if somebody writes over it.
        tensors = load(read_bytes(folder / "policy.safetensors", MAX_TENSORS))
    except (OSError, ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadRequest(key, folder, f"its policy cannot be read: {reason}") from None
    if isinstance(data, dict) and data.get("schema") == 2:
        data = upgraded(data)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise BadRequest(
            key, folder, f"policy.json has schema {schema}; this version reads {SCHEMA}"
        )
    needed = data.get("plugins", {})
    if not isinstance(needed, dict):
        raise BadRequest(key, folder, "policy.json garbles plugins")
    plugins.check_there(key, folder, needed)
    try:
        task = read_task(data)
        clip = float(data["norm_clip"])
        trained_with = {str(k): str(v) for k, v in dict(data["versions"]).items()}
        if not trained_with:
            raise ValueError("versions")
        if not all(text.isprintable() for text in trained_with.values()):
            raise ValueError("versions, which cannot be printed")
        if not (clip > 0.0 and np.isfinite(clip)):
            raise ValueError("norm_clip")
        if len(dict(data["actor"]).get("hidden_sizes", [])) > len(tensors):
            raise ValueError("hidden_sizes")
        config = parse_actor(data)
        if isinstance(config.actor, SequenceConfig) and config.conditioning is None:
            raise KeyError("conditioning")
        with torch.device("meta"):  # so that a hostile size in the JSON allocates nothing
            actor = build_policy(config, task.obs_dim, task.act_dim, kernel=kernel)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadRequest(key, folder, f"policy.json lacks or garbles {reason}") from None
    weights = {k.removeprefix("actor."): v for k, v in tensors.items() if k.startswith("actor.")}
    moments = {k.removeprefix("norm."): v for k, v in tensors.items() if k.startswith("norm.")}
    expected = {name: (p.shape, p.dtype) for name, p in actor.state_dict().items()}
    if {name: (p.shape, p.dtype) for name, p in weights.items()} != expected:
        raise BadRequest(key, folder, "policy.safetensors does not fit the shapes in policy.json")
    wanted = {"count": (), "mean": (task.obs_dim,), "var": (task.obs_dim,)}
    if {name: tuple(v.shape) for name, v in moments.items()} != wanted:
        raise BadRequest(key, folder, "the observation normaliser is missing or does not fit")
    types = {"count": torch.int64, "mean": torch.float64, "var": torch.float64}
    if {name: v.dtype for name, v in moments.items()} != types:
        raise BadRequest(key, folder, "the observation normaliser has other number types")
    if len(weights) + len(moments) != len(tensors):
        raise BadRequest(key, folder, "policy.safetensors holds tensors of no policy")
    if not all(v.isfinite().all() for v in tensors.values()):
        raise BadRequest(key, folder, "policy.safetensors holds a NaN or an infinity")
    if moments["count"] < 0 or (moments["var"] < 0).any():
        raise BadRequest(key, folder, "the observation normaliser has a negative count or variance")
    compression = None
    if (compressed := data.get("compression")) is not None:
        try:
            if not isinstance(compressed, dict):
                raise TypeError("compression")
            compression = parse(Compression, compressed, key="compression")
            if isinstance(actor, Proposer | SequenceActor):
                raise ValueError("compression")
            compression.check(actor, weights, task)
        except (TypeError, ValueError) as error:
            raise BadRequest(key, folder, f"policy.json garbles {error}") from None
    actor.load_state_dict(weights, assign=True)
    if compression is not None and isinstance(actor, SpikingActor):
        actor.early_exit = compression.early_exit
    norm = RunningNorm(task.obs_dim, clip)
    norm.load(moments)
    policy = Policy(task, config, actor.to(device), norm)
    policy.trained_with, policy.compression = trained_with, compression
    return policy
