# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`ConversionTrainer`]."""

from dataclasses import dataclass, field

from ..models.arguments import whole
from .mgm_config import MGMTrainingConfig
from .options import GAP, POSITIVE, check_values


ALLOWED = {
    "distillation_weight": POSITIVE,
    "distillation_warmup_steps": whole(0, unit="steps"),
    "distillation_temperature": POSITIVE,
    "gap_range": GAP,
}


@dataclass
class ConversionConfig(MGMTrainingConfig):
    r"""
    Arguments of [`ConversionTrainer`], beside those of [`MGMTrainingConfig`]. The defaults are the paper's.

    Default that differs from [`MGMTrainingConfig`]: `max_steps=40_000`.

    Args:
        distillation_weight (`float`, defaults to 0.1): λ.
        distillation_warmup_steps (`int`, defaults to 5000): Steps over which λ grows from 0.
        distillation_temperature (`float`, defaults to 1.5): τ of both softmaxes; the loss carries τ².
        gap_range (`list[float]`, defaults to [0.05, 0.30]): The teacher's time is the student's less a gap from it.

    Raises:
        `ValueError`: on a value that is not allowed.
    """

    max_steps: int = 40_000

    distillation_weight: float = 0.1
    distillation_warmup_steps: int = 5000
    distillation_temperature: float = 1.5
    gap_range: list[float] = field(default_factory=lambda: [0.05, 0.30])

    def __post_init__(self):
        check_values(self, ALLOWED)
        super().__post_init__()
