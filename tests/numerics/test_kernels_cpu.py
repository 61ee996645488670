"""The C++ kernel against the reference: actions and every gradient, on each processor path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CUBA_LIF, POISSON, POPULATION, lif_config, popsan, with_neurons
from torch import Tensor

from spikerl import kernels
from spikerl.algos.base import flatten
from spikerl.errors import BadRequest
from spikerl.kernels import build as native
from spikerl.kernels import cpu, reference
from spikerl.kernels.gradient import Gradient
from spikerl.kernels.prepared import fused
from spikerl.models.actor import SpikingActor

PATHS = native.supported_paths()
SIZES = [  # observations, actions, hidden widths, spike steps, samples
    (17, 6, [256, 256], 5, 100),
    (1, 1, [1], 1, 1),
    (1, 1, [1], 32, 1),
    (3, 2, [7, 33, 5], 5, 21),
    (11, 3, [16], 8, 4),
    (11, 3, [48, 31], 9, 5),
    (4, 1, [65], 32, 37),
    (2, 5, [300, 17], 17, 3),
    (41, 2, [33], 7, 130),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(obs: int, act: int, hidden: list[int], steps: int, **kwargs: object) -> SpikingActor:
    """An actor with weights large enough that every layer fires, at different rates."""
    torch.manual_seed(sum(hidden) + steps)
    actor = popsan(obs, act, hidden, spike_steps=steps, **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in actor.layers:
            layer.weight_IN.mul_(3.0)
    return actor


def run(
    actor: SpikingActor, kernel: str, obs: Tensor, direction: Tensor
) -> tuple[Tensor, list[Tensor]]:
    actor.kernel = kernel
    act = actor(obs, torch.Generator().manual_seed(3))
    return act.detach(), list(torch.autograd.grad(act, list(actor.parameters()), direction))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("encoder", [POPULATION, POISSON], ids=["population", "poisson"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_actions_and_gradients(path: str, encoder: object, size: tuple[Any, ...]) -> None:
    *shape, batch = size
    actor = made(*shape, encoder=encoder)
    obs, direction = torch.randn(batch, shape[0]), torch.randn(batch, shape[1])
    expected, grads = run(actor, "reference", obs, direction)
    act, ours = run(actor, f"cpu/{path}", obs, direction)
    torch.testing.assert_close(act, expected, rtol=0, atol=2e-6)
    for (name, _), grad, other in zip(actor.named_parameters(), ours, grads, strict=True):
        assert difference(grad, other) < 2e-5, name
    with torch.no_grad():
        again = actor(obs, torch.Generator().manual_seed(3))
    assert torch.equal(again, act)  # the same with and without a gradient


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [SIZES[2], SIZES[3], SIZES[5], SIZES[6]], ids=str)
def test_what_spikes_cost(path: str, size: tuple[Any, ...]) -> None:
    """The cost's gradient, with and without that of an action; its loss is added to `into.loss`."""
    *shape, batch = size
    actor = made(*shape, spike_cost=[0.5 + i for i in range(len(shape[2]) + 1)])
    actor.schedule(0, 1)
    obs, direction = torch.randn(batch, shape[0]), torch.randn(batch, shape[1])
    for grad in (direction, torch.zeros_like(direction)):
        found = []
        for kernel in ("reference", f"cpu/{path}"):
            actor.kernel = kernel
            _, pull = actor.vjp(obs, None)
            into = Gradient(list(actor.parameters()), weight=0.25)
            into.loss.fill_(3.0)
            loss = pull(grad, into)["spike_loss"]
            torch.testing.assert_close(into.loss, 3.0 + 0.25 * loss)
            found.append([loss, into.loss.clone(), *(slot.clone() for slot in into.slots)])
        for ours, other in zip(found[1], found[0], strict=True):
            assert difference(ours, other) < 2e-5
        assert float(found[0][0]) > 0.1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [1, 7])
def test_exact_where_sums_are(path: str, batch: int) -> None:
    """With dyadic weights and actions of 0 no sum is rounded, so that its order does not matter."""
    actor = made(5, 3, [40, 23], 2)
    with_neurons(actor, replace(CUBA_LIF, voltage_decay=0.5))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in actor.parameters():
            if p is not actor.encoder.mean_OP and p is not actor.encoder.std_OP:
                p.copy_(torch.randint(-2, 3, p.shape, generator=draw) / 4.0)
        obs = torch.tensor([[0.3, -1.1, 2.0, 0.0, -0.6]]).expand(batch, -1)
        pre_tanh = reference.outputs(actor, obs, None)
        actor.decoder.get_parameter("bias_A").sub_(pre_tanh[0])
    direction = torch.tensor([[0.5, -1.0, 0.25]]).expand(batch, -1)
    expected, grads = run(actor, "reference", obs, direction)
    assert torch.equal(expected, torch.zeros(batch, 3))
    act, ours = run(actor, f"cpu/{path}", obs, direction)
    assert torch.equal(act, expected)
    compared = 0
    for (name, _), grad, other in zip(actor.named_parameters(), ours, grads, strict=True):
        if not name.startswith("encoder"):  # its activities are exponentials, which are rounded
            assert torch.equal(grad, other), name
            compared += int(other.count_nonzero())
    assert compared > 150


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [-50.0, 50.0], ids=["silent", "saturated"])
def test_layers_that_never_or_always_fire(path: str, bias: float) -> None:
    actor = made(3, 2, [20, 19], 5)
    with torch.no_grad():
        actor.layers[1].bias_N.fill_(bias)
    obs, direction = torch.randn(9, 3), torch.randn(9, 2)
    expected, grads = run(actor, "reference", obs, direction)
    act, ours = run(actor, f"cpu/{path}", obs, direction)
    torch.testing.assert_close(act, expected, rtol=0, atol=1e-6)
    for grad, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6)
    assert not any(g.any() for g in ours[2:6])  # no voltage of that layer is inside the window


@pytest.mark.parametrize("path", PATHS)
def test_lanes_that_are_no_neurons(path: str) -> None:
    """Lanes that pad a vector have voltage 0, inside a window wider than the threshold: they must
    add nothing to a gradient.
    """
    actor = made(2, 1, [5, 3], 5)
    with_neurons(actor, replace(CUBA_LIF, surrogate_window=0.8))
    obs, direction = torch.randn(6, 2), torch.randn(6, 1)
    _, grads = run(actor, "reference", obs, direction)
    _, ours = run(actor, f"cpu/{path}", obs, direction)
    for grad, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_neurons(decay: float) -> None:
    """`cuba_lif` and `lif` with constants that no other test uses."""
    same: dict[str, Any] = {"voltage_decay": 0.6, "threshold": 0.7, "surrogate_window": 0.4}
    config = replace(CUBA_LIF, current_decay=decay, **same)
    actor = made(6, 2, [31, 18], 6)
    obs, direction = torch.randn(30, 6), torch.randn(30, 2)
    for neuron in (config, *([lif_config(**same)] if decay == 0.0 else [])):
        with_neurons(actor, neuron)
        expected, grads = run(actor, "reference", obs, direction)
        act, ours = run(actor, f"cpu/{PATHS[0]}", obs, direction)
        torch.testing.assert_close(act, expected, rtol=0, atol=1e-6)
        for grad, other in zip(ours, grads, strict=True):
            assert difference(grad, other) < 2e-5


def test_spikes_that_differ_are_few() -> None:
    """Sums in another order change a spike only where a voltage is very near its threshold."""
    actor = made(17, 6, [256, 256], 5)
    obs = torch.randn(2000, 17).clamp(-3, 3)
    with torch.no_grad():
        expected = reference.actions(actor, obs, None)
        actor.kernel = f"cpu/{PATHS[0]}"
        act = actor(obs)
    flipped = ((act - expected).abs() > 1e-5).any(1)
    _, states = reference.record(actor, obs, None)
    voltages = [torch.stack([state.voltage_BN for state in own]) for own in states]
    margin = torch.stack([(v - 0.5).abs().amin((0, 2)) for v in voltages]).amin(0)
    assert float(flipped.float().mean()) < 0.01
    assert not (flipped & (margin > 1e-5)).any()


def test_the_same_bits_for_any_number_of_threads() -> None:
    actor = made(17, 6, [256, 100], 5)
    obs, direction = torch.randn(100, 17), torch.randn(100, 6)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        act, grads = run(actor, f"cpu/{PATHS[0]}", obs, direction)
        results.append([act, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_that_moved_are_found() -> None:
    """The kernel prepares a network once, but uses tensors that replace its own afterwards."""
    actor, other = made(3, 2, [8], 5), made(3, 2, [8], 4)
    actor.kernel = f"cpu/{PATHS[0]}"
    obs = torch.randn(4, 3)
    actor(obs)
    actor.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    expected = torch.tanh(reference.outputs(actor, obs, None))
    torch.testing.assert_close(actor(obs), expected, rtol=0, atol=1e-6)
    flatten(actor)
    torch.testing.assert_close(actor(obs), expected, rtol=0, atol=1e-6)


def test_two_graphs_at_once() -> None:
    """A second forward pass does not overwrite what the first one saved for its gradient."""
    actor = made(3, 2, [8], 5)
    actor.kernel = f"cpu/{PATHS[0]}"
    params = list(actor.parameters())
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    alone = torch.autograd.grad(actor(one).sum(), params)
    first, second = actor(one).sum(), actor(two).sum()
    torch.autograd.grad(second, params)
    for a, b in zip(torch.autograd.grad(first, params), alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 5, 32])
def test_one_layers_scan(path: str, steps: int) -> None:
    """The scan of one layer, used where a network cannot run in one call."""
    actor = made(3, 2, [8], steps)
    drive = torch.randn(steps, 7, 13) * 0.5
    weight = torch.randn_like(drive)
    found = []
    for scan in (reference.scan, cpu.kernel(path).scan):
        x = drive.clone().requires_grad_()
        spikes = scan(actor.neurons[0], x)
        (grad,) = torch.autograd.grad((spikes * weight).sum(), x)
        found.append((spikes.detach(), grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)
    assert 0.0 < float(found[0][0].mean()) < 1.0


def test_rounded_products_run_layer_by_layer() -> None:
    actor = made(4, 2, [32], 5, dtype=torch.bfloat16)
    obs, direction = torch.randn(16, 4), torch.randn(16, 2)
    expected, grads = run(actor, "reference", obs, direction)
    act, ours = run(actor, f"cpu/{PATHS[0]}", obs, direction)
    assert not fused(actor)
    assert torch.equal(act, expected)
    for grad, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6)


# --- building -----------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, in memory and on disk; libraries are built fast, without optimisation."""
    monkeypatch.setattr(native, "FLAGS", [{"-O3": "-O0"}.get(flag, flag) for flag in native.FLAGS])
    monkeypatch.setenv("SPIKERL_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    cpu.kernel.cache_clear()
    yield tmp_path
    native.library.cache_clear()
    cpu.kernel.cache_clear()


AUTO = kernels.KernelConfig(name="auto", path=None)
CPU = kernels.KernelConfig(name="cpu", path=None)
PORTABLE = kernels.KernelConfig(name="cpu", path="portable")


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = kernels.resolve(AUTO, "cpu")
    assert said == ("reference", "no C++ compiler (no-such-compiler)")
    with pytest.raises(BadRequest, match=r"kernel=cpu: no C\+\+ compiler"):
        kernels.resolve(CPU, "cpu")


def test_a_compiler_that_cannot_be_read(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "-m32')
    said = kernels.resolve(AUTO, "cpu")
    assert said == ("reference", 'CXX=g++ "-m32: no closing quotation')
    with pytest.raises(BadRequest, match=r'kernel=cpu: CXX=g\+\+ "-m32: no closing quotation'):
        kernels.resolve(CPU, "cpu")


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (["x.cpp: In f:", "x.cpp:1: error: no"], "x.cpp:1: error: no"),
        (["x.cpp:1: Fehler: nein", "ld gab 1 zurück"], "x.cpp:1: Fehler: nein"),
        ([], "status 1"),
    ],
)
def test_a_compiler_that_fails(
    says: list[str], said: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fresh / "cxx"
    lines = "".join(f"echo '{line}' >&2\n" for line in says)
    text = f"#!/bin/sh\n[ $1 = --version ] && exit\n{lines}exit 1\n"
    script.write_text(text, encoding="latin-1")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    found = kernels.resolve(AUTO, "cpu")
    assert found == ("reference", f"{script} failed: {said}")
    assert not list((fresh / "cache" / "spikerl").glob("*.so"))


@pytest.mark.slow
@pytest.mark.skipif("avx512" not in PATHS, reason="needs a processor with AVX-512")
def test_a_compiler_older_than_the_processor(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kernel=auto takes the next best path and says why; a path that was named is refused."""
    script = fresh / "cxx"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-m$OLD*) echo \'error: -m?\' >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("OLD", "amx" if PATHS[0] == "amx" else "avx512")
    said = kernels.resolve(AUTO, "cpu")
    assert said.choice == f"cpu/{PATHS[1]}"
    assert said.reason.endswith(f"; not {PATHS[0]}: {script} failed: error: -m?")
    with pytest.raises(BadRequest, match=r"kernel=cpu: .*error: -m\?"):
        kernels.resolve(replace(CPU, path=PATHS[0]), "cpu")


def test_matrix_units_that_the_system_does_not_give_out(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_may_use_tiles", lambda: False)
    assert native.supported_paths.__wrapped__() == [path for path in PATHS if path != "amx"]
    with pytest.raises(native.Unbuilt, match="does not give out AMX tiles"):
        native.library.__wrapped__("amx")


def test_a_cache_that_others_can_write_to(fresh: Path) -> None:
    (fresh / "cache" / "spikerl").mkdir(parents=True)
    (fresh / "cache" / "spikerl").chmod(0o777)
    remedy = "can be written to by others; name another with SPIKERL_CACHE=FOLDER"
    assert remedy in kernels.resolve(AUTO, "cpu").reason


def test_it_is_built_once_and_damage_is_noticed(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.resolve(PORTABLE, "cpu").choice == "cpu/portable"
    (built,) = (fresh / "cache" / "spikerl").glob("*.so")
    native.library.cache_clear()
    monkeypatch.setattr(native, "_build", None)
    assert native.library("portable")._name == str(built)

    other = fresh / "other" / "spikerl"
    other.mkdir(parents=True)
    (other / built.name).write_bytes(b"no library")
    monkeypatch.setenv("SPIKERL_CACHE", str(fresh / "other"))
    native.library.cache_clear()
    with pytest.raises(BadRequest, match="cannot be loaded"):
        kernels.resolve(PORTABLE, "cpu")


def test_another_device() -> None:
    with pytest.raises(BadRequest, match="kernel=cpu: this run uses cuda:0"):
        kernels.resolve(CPU, "cuda:0")


def test_the_way_back_is_walked_once() -> None:
    """The memory that a gradient needs is released after it, so that a second call fails."""
    actor = made(4, 2, [8], 5)
    actor.kernel = f"cpu/{PATHS[0]}"
    act, pull = actor.vjp(torch.randn(6, 4), None)
    into = Gradient(list(actor.parameters()))
    pull(torch.ones_like(act), into)
    assert into.vector.any()
    with pytest.raises(IndexError):
        pull(torch.ones_like(act), into)


def test_observations_of_another_format_are_refused() -> None:
    actor = made(4, 2, [8], 5)
    actor.kernel = f"cpu/{PATHS[0]}"
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        actor(torch.randn(6, 4, dtype=torch.float64))


def test_what_is_not_learned_gets_no_gradient() -> None:
    """With a fixed encoder, the other gradients are those of an actor that learns all."""
    actor, obs, found = made(4, 2, [8], 5), torch.randn(6, 4), []
    actor.kernel = f"cpu/{PATHS[0]}"
    for learned in (True, False):
        actor.encoder.requires_grad_(learned)
        into = Gradient(list(actor.parameters()))
        act, pull = actor.vjp(obs, None)
        pull(torch.ones_like(act), into)
        found.append(into.slots)
    for one, other in zip(found[0][2:], found[1], strict=True):
        assert torch.equal(one, other)


def test_a_library_of_another_machine_is_not_taken(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache may be in a home folder that machines of two kinds share."""
    built: list[str] = []
    monkeypatch.setattr(native, "_build", lambda command, path: built.append(path.name))
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        native.library.cache_clear()
        with pytest.raises(native.Unbuilt):
            native.library("portable")
    assert len(set(built)) == 2
