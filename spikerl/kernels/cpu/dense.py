"""Critics, and dense networks that map observations to actions.

Shape legend   B batch, O observation entries, A actions, C critics.
"""

from __future__ import annotations

import ctypes
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from spikerl.kernels import reference
from spikerl.kernels.cpu.blocks import blocks
from spikerl.kernels.gradient import Gradient, Pullback
from spikerl.kernels.nets import DenseNet, ValueNet
from spikerl.kernels.prepared import PreparedCritic, PreparedDense, address, check_shape, covered
from spikerl.types import Batch


def takes(ready: PreparedCritic, obs_BO: Tensor, act_BA: Tensor, *numbers_B: Tensor) -> bool:
    """Whether the library runs the critic on these inputs; `numbers_B` have one number per row.

    Raises ValueError if it could but a shape is wrong.
    """
    if not covered(ready, obs_BO, act_BA, *numbers_B):
        return False
    batch = len(obs_BO)
    check_shape(obs_BO, batch, ready.all.obs_dim)
    check_shape(act_BA, batch, ready.all.act_dim)
    for number_B in numbers_B:
        check_shape(number_B, batch)
    return True


def takes_obs(ready: PreparedDense, obs_BO: Tensor) -> bool:
    if not covered(ready, obs_BO):
        return False
    check_shape(obs_BO, len(obs_BO), ready.net.obs_dim)
    return True


class DenseCalls:
    """`tiles`: whether bf16 products run on the AMX matrix units."""

    def __init__(self, lib: ctypes.CDLL, tiles: bool) -> None:
        self.lib, self.tiles = lib, tiles
        self.critics: WeakKeyDictionary[ValueNet, PreparedCritic] = WeakKeyDictionary()
        self.dense: WeakKeyDictionary[DenseNet, PreparedDense] = WeakKeyDictionary()

    def prepare_critic(self, critic: ValueNet, act_dim: int) -> PreparedCritic:
        ready = self.critics.get(critic)
        if ready is None or ready.all.act_dim != act_dim or ready.moved():
            ready = self.critics[critic] = PreparedCritic(critic, act_dim, self.tiles)
        return ready

    def prepare_dense(self, net: DenseNet) -> PreparedDense:
        ready = self.dense.get(net)
        if ready is None or ready.moved():
            ready = self.dense[net] = PreparedDense(net)
        return ready

    def values(self, critic: ValueNet, obs_BO: Tensor, act_BA: Tensor) -> Tensor:
        """Values (C, B)."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        if not takes(ready, obs_BO, act_BA) or torch.is_grad_enabled():
            return reference.values(critic, obs_BO, act_BA)
        obs, act = obs_BO.contiguous(), act_BA.contiguous()
        values = obs.new_empty(ready.all.networks, len(obs))
        places = (obs.data_ptr(), act.data_ptr(), values.data_ptr())
        self.lib.spikerl_values(ready.all, len(obs), *places, torch.get_num_threads())
        return values

    def td_target(
        self, critic: ValueNet, rows: Batch, act_BA: Tensor, bonus_B: Tensor | None = None
    ) -> Tensor:
        """As `reference.td_target`."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        obs, rew, discount = rows.next_obs, rows.rew, rows.discount
        bonus = () if bonus_B is None else (bonus_B.contiguous(),)
        fits = takes(ready, obs, act_BA, rew, discount, *bonus)
        if not fits or rows.terminated.dtype != torch.bool or torch.is_grad_enabled():
            return reference.td_target(critic, rows, act_BA, bonus_B)
        check_shape(rows.terminated, len(obs))
        fields = [x.contiguous() for x in (obs, act_BA, rew, discount, rows.terminated)]
        target = torch.empty_like(fields[2])
        places = (x.data_ptr() for x in (*fields, target))
        added = bonus[0].data_ptr() if bonus else None
        self.lib.spikerl_td_target(ready.all, len(obs), *places, added, torch.get_num_threads())
        return target

    def critic_backward(
        self, critic: ValueNet, obs_BO: Tensor, act_BA: Tensor, target_B: Tensor, into: Gradient
    ) -> Tensor:
        """As `reference.critic_backward`."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        if not takes(ready, obs_BO, act_BA, target_B):
            return reference.critic_backward(critic, obs_BO, act_BA, target_B, into)
        obs, act, target = obs_BO.contiguous(), act_BA.contiguous(), target_B.contiguous()
        mean = target.new_empty(())
        self.lib.spikerl_critic_backward(
            ready.all, len(obs), obs.data_ptr(), act.data_ptr(), target.data_ptr(), into.weight,
            into.at, into.loss.data_ptr(), mean.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return mean

    def actor_loss_grad(
        self,
        critic: ValueNet,
        obs_BO: Tensor,
        act_BA: Tensor,
        into: Gradient,
        lowest: bool = False,
    ) -> Tensor:
        """As `reference.actor_loss_grad`."""
        ready = self.prepare_critic(critic, act_BA.shape[1])
        if not takes(ready, obs_BO, act_BA):
            return reference.actor_loss_grad(critic, obs_BO, act_BA, into, lowest)
        obs, act = obs_BO.contiguous(), act_BA.contiguous()
        grad = torch.empty_like(act)
        value = self.lib.spikerl_actor_loss_grad(
            ready.all if lowest else ready.first, len(obs), obs.data_ptr(), act.data_ptr(),
            -into.weight, grad.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        into.loss.fill_(-into.weight * value)
        return grad

    # --- a dense network --------------------------------------------------------------------------

    def dense_actions(self, net: DenseNet, obs_BO: Tensor, squash: bool = True) -> Tensor:
        """As `reference.dense_actions`."""
        ready = self.prepare_dense(net)
        if not takes_obs(ready, obs_BO) or torch.is_grad_enabled():
            return reference.dense_actions(net, obs_BO, squash)
        return self.dense_forward(ready, obs_BO.contiguous(), None, squash)

    def dense_forward(
        self, ready: PreparedDense, obs_BO: Tensor, saved: Tensor | None, squash: bool
    ) -> Tensor:
        """Actions; `saved`, if given, receives what the backward pass needs."""
        act = obs_BO.new_empty(len(obs_BO), ready.widths[-1])
        self.lib.spikerl_dense_forward(
            ready.net, len(obs_BO), obs_BO.data_ptr(), act.data_ptr(),
            address(saved), squash, torch.get_num_threads(),
        )  # fmt: skip
        return act

    def dense_vjp(
        self, net: DenseNet, obs_BO: Tensor, squash: bool = True
    ) -> tuple[Tensor, Pullback]:
        """As `reference.dense_vjp`, without autograd."""
        ready = self.prepare_dense(net)
        if not takes_obs(ready, obs_BO):
            return reference.dense_vjp(net, obs_BO, squash)
        obs, batch = obs_BO.contiguous(), len(obs_BO)
        saved = [blocks.acquire(self.lib.spikerl_dense_saved_bytes(ready.net, batch) // 4)]
        act = self.dense_forward(ready, obs, saved[0], squash)

        def pull(grad_BA: Tensor, into: Gradient) -> dict[str, Tensor]:
            check_shape(grad_BA, *act.shape)
            room, grad = saved.pop(), grad_BA.float().contiguous()  # fails at a second call
            self.lib.spikerl_dense_backward(
                ready.net, batch, obs.data_ptr(), act.data_ptr() if squash else None,
                grad.data_ptr(), room.data_ptr(), into.at, torch.get_num_threads(),
            )  # fmt: skip
            blocks.release(room)
            return {}

        return act, pull

    def mse_backward(self, net: DenseNet, obs_BO: Tensor, goal_BA: Tensor, into: Gradient) -> None:
        """As `reference.mse_backward`."""
        ready = self.prepare_dense(net)
        if not takes_obs(ready, obs_BO) or not covered(ready, goal_BA):
            return reference.mse_backward(net, obs_BO, goal_BA, into)
        check_shape(goal_BA, len(obs_BO), ready.widths[-1])
        obs, goal = obs_BO.contiguous(), goal_BA.contiguous()
        self.lib.spikerl_mse_backward(
            ready.net, len(obs), obs.data_ptr(), goal.data_ptr(), into.weight, into.at,
            into.loss.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return None
