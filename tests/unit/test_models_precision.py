"""Number formats: which products use them, which values stay in float32, what is refused."""

from __future__ import annotations

import pytest
import torch
from builders import POPULATION, popsan, td3_config, twin_critic
from torch import Tensor

from spikerl.algos.td3 import TD3
from spikerl.errors import BadRequest
from spikerl.kernels import reference
from spikerl.models.actor import MLPActor
from spikerl.models.actor_config import MLPConfig
from spikerl.models.precision import PrecisionConfig, check_precision
from spikerl.types import Batch

CPU = torch.device("cpu")


def precision(name: str, actor: str = "fp32") -> PrecisionConfig:
    return PrecisionConfig(name=name, actor=actor, critic=name)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spiking_products_round_and_membranes_do_not(dtype: torch.dtype) -> None:
    """Voltages equal float32 dynamics on the rounded products, to the last bit."""
    torch.manual_seed(0)
    low, full = popsan(4, 2, [32], dtype=dtype), popsan(4, 2, [32])
    full.load_state_dict(low.state_dict())
    obs = torch.randn(16, 4)
    spikes, states = reference.record(low, obs, None)
    voltages = [torch.stack([state.voltage_BN for state in own]) for own in states]
    assert all(t.dtype == torch.float32 for t in (*spikes, *voltages))
    layer = low.layers[0]
    weight, bias = layer.weight_IN.detach().to(dtype), layer.bias_N.detach().to(dtype)
    products = spikes[0].flatten(0, 1).to(dtype)
    drive = rounded(torch.addmm(bias, products, weight).unflatten(0, (5, -1)), dtype)
    c = v = o = torch.zeros_like(drive[0])
    for t in range(5):
        c = 0.5 * c + drive[t]
        v = 0.75 * v * (1 - o) + c
        o = (v > 0.5).float()
        assert torch.equal(voltages[0][t], v)
    plain, _ = reference.record(full, obs, None)
    assert torch.equal(plain[0], spikes[0])  # the encoder multiplies nothing in this format


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_critic_is_close_and_parameters_stay_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    low, full = twin_critic(4, 2, [64, 64], dtype), twin_critic(4, 2, [64, 64])
    full.load_state_dict(low.state_dict())
    obs, act = torch.randn(32, 4), torch.rand(32, 2)
    q, q_full = low(obs, act), full(obs, act)
    assert q.dtype == torch.float32
    assert 0.0 < (q - q_full).abs().max().item() < 0.02
    q.sum().backward()
    for p in low.parameters():
        assert p.dtype == torch.float32
        assert p.grad is not None
        assert p.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("actor", ["fp32", "same"])
def test_updates_learn_in_low_precision(name: str, actor: str) -> None:
    """The critics fit a fixed target as in fp32; the optimisers' state stays in float32."""
    losses = {}
    for which in ("fp32", name):
        config = precision(which, which if actor == "same" else "fp32")
        torch.manual_seed(0)
        td3 = TD3(
            popsan(3, 1, [32], encoder=POPULATION, dtype=config.actor_dtype),
            twin_critic(3, 1, [32, 32], config.critic_dtype),
            td3_config(policy_delay=2),
            actor_lr=1e-3,
            generator=torch.Generator().manual_seed(0),
            scales_loss=config.scales_loss,
        )
        obs = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
        done = torch.ones(64, dtype=torch.bool)
        b = Batch(obs, obs[:, :1].clamp(-1, 1), obs.sum(1), obs, done, torch.full((64,), 0.9))
        first = float(td3.run_updates(b, 1)[0]["critic_loss"])
        for _ in range(150):
            last = float(td3.run_updates(b, 1)[0]["critic_loss"])
        td3.check()
        losses[which] = last / first
        for stepper in (td3.actor_optimizer, td3.critic_optimizer):
            state = stepper.state()
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
            assert int(state["step"]) == (151 if stepper is td3.critic_optimizer else 76)
    assert losses["fp32"] < 0.05
    assert losses[name] < 0.07


def test_dense_actor_rounds_too() -> None:
    torch.manual_seed(0)
    config = MLPConfig(name="mlp", hidden_sizes=[32, 32], lr=1e-3)
    low, full = MLPActor(4, 2, config, dtype=torch.bfloat16), MLPActor(4, 2, config)
    full.load_state_dict(low.state_dict())
    obs = torch.randn(32, 4)
    assert 0.0 < float((low(obs) - full(obs)).detach().abs().max()) < 0.02
    assert low(obs).dtype == torch.float32


def test_only_fp16_scales_its_loss() -> None:
    assert not precision("fp32").scales_loss
    assert not precision("bf16").scales_loss
    assert precision("fp16").scales_loss
    assert PrecisionConfig(name="mixed", actor="fp16", critic="bf16").scales_loss


def test_cpu_refuses_fp16_and_says_what_to_do() -> None:
    check_precision(precision("fp32"), CPU)
    check_precision(precision("bf16"), CPU)
    with pytest.raises(BadRequest, match=r"^precision=fp16: .*use precision=bf16"):
        check_precision(precision("fp16"), CPU)


def test_gpu_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kw: kw["including_emulation"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BadRequest, match=r"^precision=bf16: .*7\.5.*use precision=fp16"):
        check_precision(precision("bf16"), torch.device("cuda:0"))
    check_precision(precision("fp16"), torch.device("cuda:0"))


def test_unknown_format_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"^precision\.critic=fp8"):
        PrecisionConfig(name="bf16", actor="fp32", critic="fp8")
