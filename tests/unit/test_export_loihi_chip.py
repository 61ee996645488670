"""The emulator's arithmetic, by hand; test_export_loihi compares it with the layers'."""

from __future__ import annotations

import numpy as np
import pytest

from spikerl.export.loihi_chip import Cells, number, shifted, synapses


def cells(
    weight: object, bias: object = (0,), vth: int = 150, du: int = 2047, dv: int = 1024
) -> Cells:
    """The cells of one layer; its weights are twice the given ones."""
    halves = np.array(weight, np.int8)
    registers = {"vth": vth, "du": du, "dv": dv}
    tensors: dict[str, np.ndarray] = {
        f"0.{name}": np.array([value], np.int32) for name, value in registers.items()
    }
    tensors |= {"0.weight": halves, "0.bias": np.array(bias, np.int8)}
    own = Cells(tensors, 0, len(halves))
    own.rest(1)
    return own


def test_a_neuron_by_hand() -> None:
    """Weight 100, current decay 1/2, voltage decay 3/4, threshold 150; all are scaled by 64."""
    own, seen = cells([[50]]), []
    for _ in range(4):
        fired = own.step(np.array([[True]]), bias=False)
        seen.append((int(own.u[0, 0]), int(own.v[0, 0]), bool(fired[0, 0])))
    # u: 6400; 3200 + 6400; 4800 + 6400; 5600 + 6400.  v: 6400; 4800 + 9600 = 14400 > 9600; ...
    assert seen == [(6400, 6400, False), (9600, 0, True), (11200, 0, True), (12000, 0, True)]


def test_strictly_above_the_threshold() -> None:
    assert not cells([[75]]).step(np.array([[True]]), bias=False)[0, 0]
    assert cells([[75]], vth=149).step(np.array([[True]]), bias=False)[0, 0]


def test_the_bias_acts_when_its_neuron_fired() -> None:
    own = cells([[50]], bias=[30])
    own.step(np.array([[False]]), bias=True)
    assert own.u[0, 0] == 60 * 64
    own.step(np.array([[False]]), bias=False)
    assert own.u[0, 0] == 30 * 64


def test_decays_round_towards_zero() -> None:
    assert shifted(np.array([4095, -4095, 4096, -4096, 8191, -8191])).tolist() == [
        0, 0, 1, -1, 1, -1
    ]  # fmt: skip
    own = cells([[-1]], vth=10)
    own.step(np.array([[True]]), bias=False)
    for _ in range(7):  # -128, -64, ..., -1
        own.step(np.array([[False]]), bias=False)
    assert own.u[0, 0] == -1
    own.step(np.array([[False]]), bias=False)
    assert own.u[0, 0] == 0


@pytest.mark.parametrize(
    ("inputs", "weight", "u"),
    [
        # Sums below 2^23 do not overflow.
        (512, 127, 512 * 254 * 64),
        (517, 127, 517 * 254 * 64 - 2**24),
        (512, -128, 2**23),  # -2^23 wraps to the other end
        (513, -128, 2**24 - 513 * 256 * 64),
        (4096, 127, 4096 * 254 * 64 - 4 * 2**24),
    ],
)
def test_the_current_wraps(inputs: int, weight: int, u: int) -> None:
    own = cells([[weight]] * inputs, vth=131071)
    own.step(np.ones((1, inputs), bool), bias=False)
    assert own.u[0, 0] == u


def test_the_voltage_saturates() -> None:
    own = cells([[127]] * 500, vth=131071, du=0, dv=0)
    assert not own.step(np.ones((1, 500), bool), bias=False)[0, 0]
    assert own.v[0, 0] == 500 * 254 * 64
    # The sum exceeds 2^23; it is limited to that, which is still above the threshold.
    assert own.step(np.zeros((1, 500), bool), bias=False)[0, 0]
    low = cells([[-128]] * 500, vth=131071, du=0, dv=0)
    low.step(np.ones((1, 500), bool), bias=False)
    low.step(np.zeros((1, 500), bool), bias=False)
    assert (low.u[0, 0], low.v[0, 0]) == (-8190000, 1 - 2**23)


def test_registers_and_weights_of_other_sizes() -> None:
    assert number(np.array([4095], np.int32), 12) == 4095
    for array in (
        np.array([4096], np.int32),
        np.array([-1], np.int32),
        np.array([1.0]),
        np.zeros(2),
    ):
        with pytest.raises(ValueError, match="12 bits"):
            number(array, 12)
    with pytest.raises(ValueError, match="int16"):
        synapses(np.zeros((1, 1), np.int16))
    with pytest.raises(ValueError, match="4097 inputs"):
        synapses(np.zeros((4097, 1), np.int8))
