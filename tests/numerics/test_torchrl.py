"""Updates of TD3+BC and IQL, compared with torchrl's losses on the same rows, weights and Adam."""

from __future__ import annotations

import multiprocessing
from importlib import import_module
from typing import Any

import pytest
import torch
from builders import iql_config, td3_bc_config, twin_critic
from plain import cut, dense, flat, q_networks, transitions
from torch import Tensor, nn

from spikerl.algos.iql import IQL
from spikerl.algos.offpolicy import OffPolicy
from spikerl.algos.td3_bc import TD3BC
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.types import Batch


def library(name: str) -> Any:
    """Import a library in a test, not when each worker of the suite collects: it takes seconds."""
    module = import_module(name)
    # It makes "spawn" the default of this process, which also runs the tests of other files.
    multiprocessing.set_start_method(None, force=True)
    return module


class Values(nn.Module):
    """Q(s, a) or V(s), of shape (B, 1)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        values: Tensor = self.net(torch.cat(inputs, -1))
        return values


class Spread(nn.Module):
    """Adds a deviation with which -log p is the mean squared error, up to a constant."""

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        return mean, torch.full_like(mean, (mean.shape[-1] / 2.0) ** 0.5)


def learner(kind: type[OffPolicy], config: Any) -> Any:
    torch.manual_seed(3)
    actor = MLPActor(3, 2, MLPConfig(name="mlp", hidden_sizes=[8], lr=1e-3))
    generator = torch.Generator().manual_seed(0)
    return kind(actor, twin_critic(3, 2, [8]), config, actor_lr=1e-3, generator=generator)


def q_modules(made: OffPolicy) -> list[Any]:
    keys = {"in_keys": ["observation", "action"], "out_keys": ["state_action_value"]}
    return [
        library("tensordict.nn").TensorDictModule(Values(net), **keys)
        for net in q_networks(made.critic)
    ]


def rows_of(batch: Batch) -> Any:
    ends = batch.terminated.unsqueeze(1)
    following = {
        "observation": batch.next_obs, "reward": batch.rew.unsqueeze(1),
        "done": ends, "terminated": ends,
    }  # fmt: skip
    fields = {"observation": batch.obs, "action": batch.act, "next": following}
    return library("tensordict").TensorDict(fields, [len(batch.rew)])


def adam(params: Any) -> torch.optim.Adam:
    return torch.optim.Adam(params.flatten_keys().values(), lr=1e-3)


def step(loss: Tensor, optimiser: torch.optim.Adam) -> float:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def test_td3_bc() -> None:
    made = learner(TD3BC, td3_bc_config(target_noise=0.0))
    policy = library("tensordict.nn").TensorDictModule(
        nn.Sequential(dense(made.actor), nn.Tanh()), in_keys=["observation"], out_keys=["action"]
    )
    loss = library("torchrl.objectives").TD3BCLoss(
        policy, q_modules(made), bounds=(-1.0, 1.0), alpha=2.5, policy_noise=0.0,
        loss_function="l2", delay_actor=True, delay_qvalue=True,
    )  # fmt: skip
    loss.make_value_estimator(gamma=0.9)
    targets = library("torchrl.objectives").SoftUpdate(loss, tau=0.005)
    critic_adam, actor_adam = adam(loss.qvalue_network_params), adam(loss.actor_network_params)
    for number, batch in enumerate(cut(transitions(7 * 8, torch.float32), 8)):
        (found,) = made.run_updates(batch, 1)
        theirs = step(loss.qvalue_loss(rows_of(batch))[0], critic_adam)
        assert float(found["critic_loss"]) == pytest.approx(theirs, rel=1e-4)
        if number % 2 == 0:
            theirs = step(loss.actor_loss(rows_of(batch))[0], actor_adam)
            assert float(found["actor_loss"]) == pytest.approx(theirs, rel=1e-4)
            targets.step()
    check(made, loss)


def test_iql() -> None:
    """torchrl's policy is a Gaussian; with a fixed deviation its loss has the same gradient."""
    made = learner(IQL, iql_config())
    mean = nn.Sequential(dense(made.actor), nn.Tanh(), Spread())
    policy = library("torchrl.modules").ProbabilisticActor(
        library("tensordict.nn").TensorDictModule(
            mean, in_keys=["observation"], out_keys=["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        distribution_class=library("torchrl.modules").IndependentNormal,
        distribution_kwargs={"tanh_loc": False},
    )
    (value_net,) = q_networks(made.value)
    value = library("tensordict.nn").TensorDictModule(
        Values(value_net), in_keys=["observation"], out_keys=["state_value"]
    )
    loss = library("torchrl.objectives").IQLLoss(
        policy, q_modules(made), value, num_qvalue_nets=2, loss_function="l2", temperature=3.0,
        expectile=0.7,
    )  # fmt: skip
    loss.make_value_estimator(gamma=0.9)
    targets = library("torchrl.objectives").SoftUpdate(loss, tau=0.005)
    value_adam, actor_adam, critic_adam = (
        adam(params)
        for params in (
            loss.value_network_params,
            loss.actor_network_params,
            loss.qvalue_network_params,
        )
    )
    for batch in cut(transitions(5 * 8, torch.float32), 8):
        (found,) = made.run_updates(batch, 1)
        theirs = step(loss.value_loss(rows_of(batch))[0], value_adam)
        assert float(found["value_loss"]) == pytest.approx(theirs, rel=1e-4)
        step(loss.actor_loss(rows_of(batch))[0], actor_adam)
        theirs = step(loss.qvalue_loss(rows_of(batch))[0], critic_adam)
        assert float(found["critic_loss"]) == pytest.approx(theirs, rel=1e-4)
        targets.step()
    check(made, loss)
    params = loss.value_network_params.flatten_keys(".")
    nets = q_networks(made.value)
    for name, p in nets[0].named_parameters():
        p.data = params[f"module.net.{name}"].data
    torch.testing.assert_close(made.optimizers["value"].flat, flat(nets), **CLOSE)


CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}


def check(made: Any, loss: Any) -> None:
    """Compare the weights after all updates, and those of the critics' targets."""
    actor = nn.Sequential(*(nn.Linear(*sizes) for sizes in ((3, 8), (8, 2))))
    params = list(loss.actor_network_params.flatten_keys(".").values())
    for mine, theirs in zip(actor.parameters(), params, strict=True):
        mine.data = theirs.data
    torch.testing.assert_close(made.actor_optimizer.flat, flat(actor), **CLOSE)
    for own, of_theirs in (
        (made.critic_optimizer.flat, loss.qvalue_network_params),
        (made.targets["critic"], loss.target_qvalue_network_params),
    ):
        nets = q_networks(made.critic)
        stacked = of_theirs.flatten_keys(".")
        for i, net in enumerate(nets):
            for name, p in net.named_parameters():
                p.data = stacked[f"module.net.{name}"][i].data
        torch.testing.assert_close(own, flat(nets), **CLOSE)
