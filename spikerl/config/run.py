"""The keys at the top level of a run's config."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spikerl.distributed import hosts
from spikerl.errors import BadRequest
from spikerl.files import absolute
from spikerl.runs.loggers import check_loggers
from spikerl.runs.policies import CHOICES
from spikerl.schema import check_seed

MOST = 4096  # environments, workers or threads, as a config file could ask for any number


@dataclass(kw_only=True)
class RunConfig:
    """The keys at the top level; `conf/train.yaml` says what each means, and its default."""

    seed: int
    total_steps: int
    steps_per_epoch: int
    eval_episodes: int
    num_envs: int | None
    world_size: int | None
    scaling: str
    device: str
    threads: int | None
    deterministic: bool
    max_restarts: int
    nnodes: int
    node_rank: int | None
    rdzv: str | None
    run_dir: str | None
    init_from: str | None
    init_policy: str
    resume: str | None
    config: str | None
    keep_replay: bool
    logger: list[str]
    plugins: list[str]
    # Configs of older runs lack these.
    dataset: str | None = None
    energy_to: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for key, least in (("total_steps", 1), ("steps_per_epoch", 1), ("eval_episodes", 0)):
            if getattr(self, key) < least:
                raise BadRequest(key, getattr(self, key), f"give at least {least}")
        for key in ("num_envs", "threads", "world_size"):
            if getattr(self, key) is not None and not 1 <= getattr(self, key) <= MOST:
                raise BadRequest(key, getattr(self, key), f"give 1 to {MOST}, or null")
        check_seed(self.seed)
        for key in ("run_dir", "init_from", "dataset"):
            if getattr(self, key) == "":
                raise BadRequest(key, "", "give a path, or null")
            if getattr(self, key):
                setattr(self, key, str(absolute(getattr(self, key))))
        self.resume = str(absolute(self.resume)) if self.resume else self.resume
        if self.scaling not in ("strong", "weak"):
            raise BadRequest("scaling", self.scaling, "give strong or weak")
        if self.init_policy not in CHOICES:
            raise BadRequest("init_policy", self.init_policy, f"give {' or '.join(CHOICES)}")
        check_loggers(self.logger)
        wanted = self.energy_to if self.energy_to is not None else {"return": 0.0}
        if wanted.keys() != {"return"} or not math.isfinite(wanted["return"]):
            raise BadRequest("energy_to", self.energy_to, "give {return: NUMBER}, or null")
        if self.max_restarts < 0:
            raise BadRequest("max_restarts", self.max_restarts, "give at least 0")
        self.check_nodes()

    def check_nodes(self) -> None:
        """Refuse node_rank and rdzv for one machine; for several, demand them and world_size."""
        nodes = self.nnodes
        if nodes < 1:
            raise BadRequest("nnodes", nodes, "give at least 1")
        if nodes == 1:
            for key in ("node_rank", "rdzv"):
                if getattr(self, key) is not None:
                    raise BadRequest(key, getattr(self, key), "is for several machines: set nnodes")
            return
        if self.world_size is None or self.world_size % nodes:
            remedy = f"give a multiple of nnodes={nodes}, the workers of all machines"
            raise BadRequest("world_size", self.world_size, remedy)
        if self.node_rank is None or not 0 <= self.node_rank < nodes:
            raise BadRequest("node_rank", self.node_rank, f"give this machine's, 0 to {nodes - 1}")
        if not hosts.is_endpoint(self.rdzv or ""):
            remedy = "give machine 0's address and a free port there, as host:29500"
            raise BadRequest("rdzv", self.rdzv, remedy)
        port, restarts = int((self.rdzv or "").rpartition(":")[2]), self.max_restarts
        if port + restarts > 65535:
            remedy = f"each of max_restarts={restarts} takes the next port; give a lower one"
            raise BadRequest("rdzv", self.rdzv, remedy)
