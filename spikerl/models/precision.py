"""The number formats in which an update computes.

Parameters, optimiser state, membranes, thresholds and losses are float32 under every precision;
only the operands of the dense products vary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spikerl.errors import BadRequest
from spikerl.kernels.build import supported_paths
from spikerl.schema import Registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class PrecisionConfig:
    name: str
    actor: str  # operands of the actor's products
    critic: str  # operands of the critics' products

    def __post_init__(self) -> None:
        for key in ("actor", "critic"):
            if getattr(self, key) not in DTYPES:
                raise BadRequest(f"precision.{key}", getattr(self, key), f"one of {list(DTYPES)}")

    @property
    def actor_dtype(self) -> torch.dtype:
        return DTYPES[self.actor]

    @property
    def critic_dtype(self) -> torch.dtype:
        return DTYPES[self.critic]

    @property
    def scales_loss(self) -> bool:
        """Gradients underflow in fp16 unless the loss is scaled up first; bf16 has fp32's range."""
        return "fp16" in (self.actor, self.critic)


PRECISIONS: Registry[PrecisionConfig, None] = Registry(
    "precision", **dict.fromkeys(DTYPES, (PrecisionConfig, type(None)))
)


def check_precision(config: PrecisionConfig, device: torch.device) -> None:
    """Refuse a format that `device` has no units for."""
    formats = {config.actor, config.critic}
    if device.type == "cpu" and "fp16" in formats:
        remedy = "a CPU only emulates float16; use precision=bf16, precision=fp32 or device=cuda"
        raise BadRequest("precision", config.name, remedy)
    if device.type != "cuda" or "bf16" not in formats:
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability(device)
        remedy = f"a GPU of capability {major}.{minor} has no bfloat16; use precision=fp16 or fp32"
        raise BadRequest("precision", config.name, remedy)


def why_slow(config: PrecisionConfig, device: str) -> str | None:
    """Why an update takes longer in these formats than in fp32, if so."""
    formats = {config.actor, config.critic}
    if device != "cpu" or "bf16" not in formats or "amx" in supported_paths():
        return None
    return "bf16 is usually slower than fp32 here: this processor has no matrix units (AMX)"
