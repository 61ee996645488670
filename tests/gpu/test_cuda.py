"""Updates, graphs and replays on a GPU; skipped without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders import popsan, proxy_td3_config, sac_config, td3_config, twin_critic

from spikerl.algos.offpolicy import OffPolicy
from spikerl.algos.proxy_td3 import ProxyTD3
from spikerl.algos.replay import Replay
from spikerl.algos.sac import SAC
from spikerl.algos.td3 import TD3
from spikerl.models.critic import Critics
from spikerl.models.normalizer import RunningNorm
from spikerl.models.precision import DTYPES
from spikerl.types import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


def td3_on(device: str, precision: str) -> TD3:
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    return TD3(
        popsan(3, 1, [32, 32]).to(device),
        twin_critic(3, 1, [32, 32], dtype).to(device),
        td3_config(target_noise=0.0),
        actor_lr=1e-3,
        generator=torch.Generator(device).manual_seed(0),
        scales_loss=precision == "fp16",
    )


def batch(device: str, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(64, 3, generator=g)
    act = torch.rand(64, 1, generator=g)
    done = torch.arange(64) % 5 == 0
    rows = (obs, act, obs.sum(1), obs.roll(1, 0), done, torch.full((64,), 0.99))
    return Batch(*(t.to(device) for t in rows))


def test_updates_agree_with_the_cpu() -> None:
    cpu, gpu = td3_on("cpu", "fp32"), td3_on("cuda", "fp32")
    for i in range(5):
        a, b = (
            cpu.run_updates(batch("cpu", i), 1)[0],
            gpu.run_updates(batch("cuda", i), 1)[0],
        )
        assert float(b["critic_loss"]) == pytest.approx(float(a["critic_loss"]), rel=1e-3)
    gpu.check()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_critics_fit_a_fixed_target(precision: str) -> None:
    td3 = td3_on("cuda", precision)
    b = batch("cuda", 0)._replace(terminated=torch.ones(64, dtype=torch.bool, device="cuda"))
    first = float(td3.run_updates(b, 1)[0]["critic_loss"])
    for _ in range(200):
        last = float(td3.run_updates(b, 1)[0]["critic_loss"])
    td3.check()
    assert last < 0.1 * first


LEARNERS: dict[str, Callable[..., OffPolicy]] = {
    "td3": lambda actor, critic, **settings: TD3(actor, critic, td3_config(), **settings),
    "sac": lambda actor, critic, **settings: SAC(actor, critic, sac_config(), **settings),
    "proxy_td3": lambda actor, critic, **settings: ProxyTD3(
        actor, critic, proxy_td3_config(), **settings
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_graphs_agree_with_launches_one_by_one(name: str) -> None:
    """Noise included: the graph draws from the same random stream."""
    made = []
    for kernel in ("triton", "triton/graphs"):
        torch.manual_seed(0)
        critic = Critics(3, 1, [32, 32], kernel=kernel).to("cuda")
        actor = popsan(3, 1, [32, 32]).to("cuda")
        actor.kernel = kernel
        generator = torch.Generator("cuda").manual_seed(0)
        learner = LEARNERS[name](actor, critic, actor_lr=1e-3, generator=generator)
        rows = [batch("cuda", seed) for seed in range(41 * learner.batches_per_update)]
        metrics = learner.run_updates(Batch(*map(torch.cat, zip(*rows, strict=True))), 41)
        learner.check()
        made.append((learner, metrics))
    (one, metrics), (other, recorded) = made
    assert other.graph is not None
    assert other.graph.calls == (40 if name == "sac" else 20)  # the first 3 launch no graph
    for name, tensor in other.state().items():
        torch.testing.assert_close(tensor, one.state()[name], rtol=1e-4, atol=1e-5)
    assert [m.keys() for m in recorded] == [m.keys() for m in metrics]
    for ours, theirs in zip(recorded, metrics, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def test_bytes_in_a_replay_on_the_device() -> None:
    plain, packed = (Replay(20, 7, 1, "cuda", obs_bytes=kind) for kind in (False, True))
    obs = torch.randint(256, (21, 7), generator=torch.Generator().manual_seed(0)).double().numpy()
    for replay in (plain, packed):
        zero = obs[:20, 0] * 0.0
        replay.add(obs[:20], zero[:, None], zero, obs[1:], zero > 0, zero > 0, discount=0.9)
    for n_step in (1, 3):
        drawn = [
            replay.sample(9, torch.Generator().manual_seed(1), torch.neg, n_step)
            for replay in (plain, packed)
        ]
        assert all(map(torch.equal, *drawn))


def test_replay_and_normaliser_live_on_the_device() -> None:
    replay, norm = Replay(10, 3, 1, "cuda"), RunningNorm(3, 3.0)
    rows = torch.arange(12.0).view(4, 3).numpy()
    norm.add(rows)
    norm.merge([norm.collect()])
    flags = rows[:, 0] > 3
    replay.add(rows, rows[:, :1] / 12, rows[:, 0], rows, flags, flags, discount=0.99)
    sampled = replay.sample(64, torch.Generator().manual_seed(0), norm.normalize)
    assert sampled.obs.device.type == "cuda"
    assert set(sampled.rew.tolist()) == {0.0, 3.0, 6.0, 9.0}
