"""The reasons that a resume gives if it is not exact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from spikerl.distributed.world import World
from spikerl.training.exactness import computed_by, inexact_because


def reasons(
    was: dict[str, Any] | None,
    device: str = "cpu",
    *,
    own_products: bool = True,
    size: int = 1,
    had: int | None = None,
    offline: bool = False,
    epoch_began: int = 0,
) -> list[str]:
    """Why the resume of a run at step 50 of 60, in mid-epoch, is not exact."""
    now = {"kernel": "k", "threads": "1", "GPU": "A", "processor": "p", "torch": "2.1",
           "backend": "gloo", "code": "abc", "total_steps": 60}  # fmt: skip
    config: Any = SimpleNamespace(
        resolved=SimpleNamespace(device=SimpleNamespace(choice=device)),
        algo=SimpleNamespace(anneals=False),
        actor=SimpleNamespace(neuron=None),
        own_products=own_products,
        num_envs=4,
        run=SimpleNamespace(total_steps=60, steps_per_epoch=49),
    )
    trainer: Any = SimpleNamespace(
        step=50,
        offline=offline,
        progress=SimpleNamespace(first_step=epoch_began),
        world=World(size=size),
    )
    manifest = {} if was is None else {"computed_by": {**now, **was}}
    checkpoint: Any = SimpleNamespace(manifest=manifest, workers=had or size)
    return inexact_because(checkpoint, now, config, trainer)


@pytest.mark.parametrize(
    ("was", "said"),
    [
        ({}, []),
        ({"kernel": "j"}, ["kernel j became k: sums are in another order"]),
        ({"torch": "2.0", "processor": "q"}, ["processor q became p", "torch 2.0 became 2.1"]),
        ({"code": "abd"}, ["code abd became abc"]),
        ({"code": None, "torch": None, "total_steps": 50}, []),  # unknown; no schedules
        (None, ["an earlier version of this program saved it"]),
    ],
)
def test_what_computes_from_now_on(was: dict[str, Any] | None, said: list[str]) -> None:
    assert reasons(was) == said


def test_what_matters_on_some_devices() -> None:
    gpu, threads = (f"{one}: sums are in another order" for one in (
        "GPU B became A", "threads 2 became 1"
    ))  # fmt: skip
    assert reasons({"GPU": "B"}) == []
    assert reasons({"GPU": "B"}, "cuda:0") == [gpu]
    assert reasons({"threads": "2"}) == []
    assert reasons({"threads": "2"}, "cuda:0") == []
    assert reasons({"threads": "2"}, own_products=False) == [threads]


def test_other_workers() -> None:
    """If 3 workers became 2, another backend is a reason, too: the order of sums differs."""
    workers = "3 workers became 2: random streams and batches differ from here on"
    backend = "backend mpi became gloo: sums are in another order"
    assert reasons({"backend": "mpi"}, size=2, had=3) == [workers, backend]
    assert reasons(None, size=2, had=3) == [workers, "an earlier version of this program saved it"]


def test_sums_of_two_workers_have_no_order() -> None:
    assert reasons({"backend": "mpi"}, size=2) == []
    said = "backend mpi became gloo: sums are in another order"
    assert reasons({"backend": "mpi"}, size=3) == [said]


def test_evaluations_in_mid_epoch() -> None:
    """Step 50 is the end of the epoch of 49 steps, as four environments step together. Offline runs
    evaluate at exact steps, so step 50 is in mid-epoch there.
    """
    assert reasons({}, epoch_began=50) == []
    assert reasons({}, offline=True) == []  # evaluated at step 0
    assert reasons({}, offline=True, epoch_began=50) == [
        "an evaluation in mid-epoch, at step 50: later ones differ, and updates may"
    ]


def test_packages_that_compute_nothing() -> None:
    names = {"python", "spikerl", "torch", "numpy", "gymnasium", "mujoco"}
    chosen = {name: SimpleNamespace(choice="c") for name in ("kernel", "threads", "backend")}
    config: Any = SimpleNamespace(
        run=SimpleNamespace(total_steps=60), resolved=SimpleNamespace(**chosen)
    )
    assert computed_by(config, World()).keys() == names | {
        "kernel", "threads", "backend", "GPU", "processor", "code", "total_steps"
    }  # fmt: skip
