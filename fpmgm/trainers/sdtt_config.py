# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`SDTTTrainer`]."""

from dataclasses import dataclass, field

from ..models.arguments import whole
from .mgm_config import MGMTrainingConfig
from .options import POSITIVE, check_values


ALLOWED = {
    **dict.fromkeys(("rounds", "steps_per_round", "teacher_steps"), whole(1)),
    "first_step_size": POSITIVE,
}


@dataclass
class SDTTConfig(MGMTrainingConfig):
    r"""
    Arguments of [`SDTTTrainer`], beside those of [`MGMTrainingConfig`].

    Default that differs from [`MGMTrainingConfig`]: `max_steps=-1`, which is `rounds` · `steps_per_round` unless
    `num_train_epochs` is given.

    Args:
        rounds (`int`, defaults to 7): Rounds; the student of one is the teacher of the next.
        steps_per_round (`int`, defaults to 10000): Optimizer steps of a round.
        teacher_steps (`int`, defaults to 2): Ancestral steps of the teacher that one step of the student replaces.
        first_step_size (`float`, defaults to 1/1024): Size in time of a teacher's step in the first round; each round
            multiplies it by `teacher_steps`.

    Raises:
        `ValueError`: on a value that is not allowed, or rounds whose last student step is longer than the whole time.
    """

    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; -1: rounds times steps_per_round."})

    rounds: int = 7
    steps_per_round: int = 10_000
    teacher_steps: int = 2
    first_step_size: float = 1 / 1024

    def __post_init__(self):
        check_values(self, ALLOWED)
        longest = self.first_step_size * self.teacher_steps**self.rounds
        if longest > 1:
            raise ValueError(
                f"`rounds`={self.rounds} of `teacher_steps`={self.teacher_steps} from `first_step_size`="
                f"{self.first_step_size:g} end with a student's step of {longest:g}, longer than the time from 1 to "
                "0: take fewer rounds or a smaller first step."
            )
        if self.loss_weighting is not None:
            raise ValueError(
                f"`loss_weighting`={self.loss_weighting!r} would be ignored: the divergence is a mean over masked "
                "positions. Leave it out."
            )
        if self.max_steps == -1 and not self.num_train_epochs:
            self.max_steps = self.rounds * self.steps_per_round
        super().__post_init__()
