"""Two baselines for `spikerl bench`, in the form in which their users run them.

`popsan_loop`  TD3 with a spiking actor that walks its spike steps in Python, each with its own
               products, as the public PopSAN code does (combra-lab/pop-spiking-deep-rl).
`dense_loop`   TD3 with dense networks in the form of CleanRL's td3_continuous_action.py.

Both keep what costs time there: one optimiser over parameter lists, Polyak averaging parameter by
parameter, gradients that nobody reads. Neither is used for training by this program.

Shape legend   T spike steps, B batch, O observation entries, A actions, P neurons of a population.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from spikerl.algos.td3 import TD3Config
from spikerl.envs.checked import CheckedEnv
from spikerl.kernels import reference
from spikerl.models.actor import SpikingActor
from spikerl.models.critic import Critics
from spikerl.snn.decoders import RateDecoder
from spikerl.snn.encoders import PopulationEncoder
from spikerl.types import Batch

GAMMA, TAU, TARGET_NOISE, NOISE_CLIP, EXPLORE_NOISE = 0.99, 0.005, 0.2, 0.5, 0.1


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, voltage: Tensor) -> Tensor:
        ctx.save_for_backward(voltage)
        return voltage.gt(0.5).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (voltage,) = ctx.saved_tensors
        return grads[0] * (abs(voltage - 0.5) < 0.5).float()


class _EncoderSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, voltage: Tensor) -> Tensor:
        return voltage.gt(0.999).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class PopSANActor(nn.Module):
    """PopSAN's actor, with the weights of `source`."""

    def __init__(self, source: SpikingActor) -> None:
        super().__init__()
        self.steps = source.spike_steps
        assert isinstance(source.encoder, PopulationEncoder)
        assert isinstance(source.decoder, RateDecoder)
        self.mean = nn.Parameter(source.encoder.mean_OP.detach().clone().unsqueeze(0))
        self.std = nn.Parameter(source.encoder.std_OP.detach().clone().unsqueeze(0))
        self.layers: list[nn.Linear] = []
        for i, layer in enumerate(source.layers):
            linear = nn.Linear(*layer.weight_IN.shape)
            with torch.no_grad():
                linear.weight.copy_(layer.weight_IN.T)
                linear.bias.copy_(layer.bias_N)
            self.layers.append(linear)
            self.add_module(f"layer{i}", linear)
        self.act_dim, self.pop = source.decoder.weight_AP.shape
        self.decoder = nn.Conv1d(self.act_dim, self.act_dim, self.pop, groups=self.act_dim)
        with torch.no_grad():
            self.decoder.weight.copy_(source.decoder.weight_AP.unsqueeze(1))
            self.decoder.bias.copy_(source.decoder.bias_A)  # type: ignore[union-attr]

    def forward(self, obs: Tensor) -> Tensor:
        distance = (obs.unsqueeze(-1) - self.mean).pow(2)
        drive = torch.exp(-0.5 * distance / self.std.pow(2)).flatten(1)
        voltage = torch.zeros_like(drive)
        spikes = obs.new_zeros(*drive.shape, self.steps)
        for t in range(self.steps):
            voltage = voltage + drive
            spikes[:, :, t] = _EncoderSpike.apply(voltage)
            voltage = voltage - spikes[:, :, t] * 0.999
        states = [
            [obs.new_zeros(len(obs), layer.out_features) for _ in range(3)] for layer in self.layers
        ]
        total = obs.new_zeros(len(obs), self.act_dim * self.pop)
        for t in range(self.steps):
            x = spikes[:, :, t]
            for i, layer in enumerate(self.layers):
                current, volt, fired = states[i]
                current = current * 0.5 + layer(x)
                volt = volt * 0.75 * (1.0 - fired) + current
                x = _Spike.apply(volt)
                states[i] = [current, volt, x]
            total = total + x
        rates = (total / self.steps).view(-1, self.act_dim, self.pop)
        return torch.tanh(self.decoder(rates).squeeze(-1))


class DenseActor(nn.Module):
    action_scale: Tensor
    action_bias: Tensor

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.hidden = layers_of(obs_dim, hidden_sizes)
        self.fc_mu = nn.Linear(hidden_sizes[-1], act_dim)
        self.register_buffer("action_scale", torch.ones(act_dim))
        self.register_buffer("action_bias", torch.zeros(act_dim))

    def forward(self, obs: Tensor) -> Tensor:
        x = obs
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return torch.tanh(self.fc_mu(x)) * self.action_scale + self.action_bias


class QNetwork(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.hidden = layers_of(obs_dim + act_dim, hidden_sizes)
        self.value = nn.Linear(hidden_sizes[-1], 1)

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        x = torch.cat([obs, act], 1)
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.value(x)


def layers_of(inputs: int, sizes: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(i, n) for i, n in pairwise([inputs, *sizes]))


class Loop:
    """TD3 as both programs write it: one module after the other, one parameter after the other."""

    def __init__(
        self,
        actor: nn.Module,
        obs_dim: int,
        act_dim: int,
        actor_lr: float,
        algo: TD3Config,
    ) -> None:
        self.actor, self.algo = actor, algo
        self.device = next(actor.parameters()).device
        self.q1, self.q2 = (
            QNetwork(obs_dim, act_dim, algo.critic_hidden_sizes).to(self.device) for _ in range(2)
        )
        self.actor_target = copy.deepcopy(actor)
        self.q1_target, self.q2_target = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.q_params = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = torch.optim.Adam(self.q_params, lr=1e-3)
        self.actor_optimizer = torch.optim.Adam(actor.parameters(), lr=actor_lr)
        self.updates = 0

    def update(self, batch: Batch) -> None:
        with torch.no_grad():
            noise = (torch.randn_like(batch.act) * TARGET_NOISE).clamp(-NOISE_CLIP, NOISE_CLIP)
            next_act = (self.actor_target(batch.next_obs) + noise).clamp(-1.0, 1.0)
            q1 = self.q1_target(batch.next_obs, next_act)
            q2 = self.q2_target(batch.next_obs, next_act)
            value = torch.min(q1, q2).view(-1)
            target = batch.rew + (1 - batch.terminated.float()) * GAMMA * value
        q1_loss = nn.functional.mse_loss(self.q1(batch.obs, batch.act).view(-1), target)
        q2_loss = nn.functional.mse_loss(self.q2(batch.obs, batch.act).view(-1), target)
        self.q_optimizer.zero_grad()
        (q1_loss + q2_loss).backward()
        self.q_optimizer.step()
        if (self.updates - self.algo.first_policy_update) % self.algo.policy_delay == 0:
            actor_loss = -self.q1(batch.obs, self.actor(batch.obs)).mean()
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            self.update_targets()
        self.updates += 1

    def update_targets(self) -> None:
        pairs = [(self.actor, self.actor_target), (self.q1, self.q1_target),
                 (self.q2, self.q2_target)]  # fmt: skip
        for online, target in pairs:
            for p, p_target in zip(online.parameters(), target.parameters(), strict=True):
                p_target.data.copy_(TAU * p.data + (1 - TAU) * p_target.data)

    def train(self, env: CheckedEnv) -> Iterator[None]:
        """Act, store, and make the updates that became due; yield after each step."""
        space = env.action_space
        assert isinstance(space, gym.spaces.Box)
        scale = float(space.high.flat[0])
        obs, _ = env.reset(seed=0)
        O, A = len(obs), math.prod(space.shape)  # noqa: E741
        widths = {"obs": O, "act": A, "rew": 1, "next_obs": O, "done": 1}
        rows = {name: np.zeros((100_000, n), np.float32) for name, n in widths.items()}
        for step in count(1):
            with torch.no_grad():
                row = torch.from_numpy(obs.astype(np.float32)).unsqueeze(0).to(self.device)
                act = self.actor(row)[0].cpu().numpy()
            act = np.clip(act + EXPLORE_NOISE * np.random.randn(A), -1.0, 1.0)
            next_obs, rew, terminated, truncated, _ = env.step((scale * act).reshape(space.shape))
            for name, value in zip(rows, (obs, act, rew, next_obs, terminated), strict=True):
                rows[name][(step - 1) % 100_000] = value
            obs = env.reset()[0] if terminated or truncated else next_obs
            due = self.algo.updates_due(step, 1) - self.algo.updates_due(step - 1, 1)
            for _ in range(due):
                self.update(draw(rows, min(step, 100_000), self.algo.batch_size, self.device))
            yield


def draw(rows: dict[str, np.ndarray], filled: int, batch_size: int, device: torch.device) -> Batch:
    index = np.random.randint(0, filled, batch_size)
    parts = {name: torch.from_numpy(array[index]).to(device) for name, array in rows.items()}
    done, discount = parts["done"].view(-1) > 0, torch.full((batch_size,), GAMMA, device=device)
    rew = parts["rew"].view(-1)
    return Batch(parts["obs"], parts["act"], rew, parts["next_obs"], done, discount)


def popsan_loop(source: SpikingActor, obs_dim: int, act_dim: int, algo: TD3Config) -> Loop:
    """The PopSAN baseline, with the weights of `source`, on its device."""
    actor = PopSANActor(source).to(source.layers[0].weight_IN.device)
    return Loop(actor, obs_dim, act_dim, 1e-4, algo)


def dense_loop(
    obs_dim: int,
    act_dim: int,
    hidden_sizes: Sequence[int],
    algo: TD3Config,
    device: torch.device,
) -> Loop:
    actor = DenseActor(obs_dim, act_dim, hidden_sizes).to(device)
    return Loop(actor, obs_dim, act_dim, 1e-3, algo)


# Standard deviation of a layer's drive, if its inputs fire independently. With this value, the
# shares of inputs that fire at all and of voltages inside the surrogate window are within a fifth
# of those of the published HalfCheetah policy.
DRIVE_STD = 1.0


@torch.no_grad()
def set_firing_rates(actor: SpikingActor, rates: list[float], obs_BO: Tensor) -> None:
    """Draw new weights with which each layer fires at its rate in `rates`, the encoder's first.

    The time of event-driven code depends on how many spikes there are, and networks of random
    weights fire 4 to 20 times less than trained ones.
    """
    generator = torch.Generator().manual_seed(0)
    encoder = actor.encoder
    assert isinstance(encoder, PopulationEncoder)

    def bisect(
        low: float, high: float, layer: int, rate: float, set_value: Callable[[float], object]
    ) -> None:
        for _ in range(20):
            middle = (low + high) / 2
            set_value(middle)
            spikes, _ = reference.record(actor, obs_BO, None)
            low, high = (middle, high) if float(spikes[layer].mean()) < rate else (low, middle)

    bisect(0.01, 3.0, 0, rates[0], encoder.std_OP.fill_)
    for i, (layer, rate) in enumerate(zip(actor.layers, rates[1:], strict=True)):
        inputs = layer.weight_IN.shape[0]
        std = DRIVE_STD / math.sqrt(inputs * rates[i])
        layer.weight_IN.normal_(0.0, std, generator=generator)
        bisect(-4.0, 4.0, i + 1, rate, layer.bias_N.fill_)


@torch.no_grad()
def set_active_shares(critic: Critics, shares: list[float], obs_BO: Tensor) -> None:
    """Move biases so that in each hidden layer its share in `shares` of the units is not 0."""
    act_dim = critic.weights_CIN[0].shape[1] - obs_BO.shape[1]
    act = torch.rand(len(obs_BO), act_dim, device=obs_BO.device) * 2.0 - 1.0
    x = torch.cat([obs_BO, act], -1).expand(2, -1, -1)
    for share, weight, bias in zip(shares, critic.weights_CIN, critic.biases_C1N, strict=False):
        drive = torch.bmm(x, weight)
        bias.copy_(bias - (drive + bias).flatten(1).quantile(1.0 - share, dim=1).view(2, 1, 1))
        x = torch.relu(drive + bias)
