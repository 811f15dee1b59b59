# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through time: one step of the student learns what several ancestral steps of a teacher give.

It is the paper's main baseline; here it also takes a fixed-point model.

Shapes: B batch, L length, D hidden size, P masked positions of the student.
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from ..models.draw import draw_tokens
from ..models.transfer import to_device
from .batch import Noise
from .checkpoints import reading
from .corruption import NoisedBatch, drawn_mask
from .distillation import check_head, check_teacher, denoise, divergence_from, mean_over_sequences
from .engines import splits_weights
from .mgm_trainer import MGMTrainer
from .run_record import known, with_teacher
from .sdtt_config import SDTTConfig
from .start import load_model


TEACHER_FILE = "teacher.safetensors"


class SDTTTrainer(MGMTrainer):
    """Distils a masked generative model, explicit or fixed-point, into fewer steps, round by round.

    The target of a position is the teacher's distribution at the moment when the position is revealed, or at its last
    step where it is not. From one round to the next the teacher becomes the student's average.

    Args:
        model (`PreTrainedModel`): The student, which starts as the teacher.
        args ([`SDTTConfig`]): Arguments.
        teacher (`PreTrainedModel`, `str` or `Path`, *optional*): Teacher of the first round. `None`: a frozen copy of
            the model.
        kwargs: As for [`MGMTrainer`].

    Raises:
        `ValueError`: if the teacher reads other tokens, an adapter wraps the head, and as [`MGMTrainer`] does.

    Example:

    ```python
    >>> from fpmgm.trainers import SDTTConfig, SDTTTrainer
    >>> args = SDTTConfig(output_dir="outputs/sdtt", rounds=5, steps_per_round=10_000)  # doctest: +SKIP
    >>> SDTTTrainer(model=model, args=args, train_dataset=blocks).train()  # doctest: +SKIP

    ```
    """

    config_class = SDTTConfig

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: SDTTConfig | None = None,
        teacher: nn.Module | str | Path | None = None,
        **kwargs,
    ):
        model = load_model(model)
        teacher = copy.deepcopy(model) if teacher is None else load_model(teacher, "teacher")
        super().__init__(model, args, **kwargs)  # may wrap the model, but not the teacher
        check_teacher(teacher, self.model)
        check_head(self.model)
        if args.rounds > 1 and splits_weights(self):
            raise ValueError(
                f"`rounds`={args.rounds} makes a copy of the student its teacher, but ZeRO-3 and FSDP split the "
                "student over ranks: use DDP, ZeRO-1 or ZeRO-2, or run one round at a time (`rounds=1`)."
            )
        self.teacher, self._promoted = teacher.to(self.args.device).eval(), False
        self._first_teacher = getattr(teacher, "name_or_path", None) or None
        self.add_callback(NextRound(self))

    def run_record(self) -> dict[str, dict]:
        """Also the teacher of the first round."""
        return with_teacher(super().run_record(), self.teacher)

    def lineage(self) -> dict[str, str]:
        """Also the rounds, and the teacher of the first."""
        args = self.args
        method = f"self-distillation through time, {args.rounds} rounds of {args.steps_per_round:,} steps, each for "
        method += f"{args.teacher_steps} steps of its teacher"
        lineage = super().lineage()
        teacher = self._first_teacher or lineage.get("started from")
        return lineage | known(method=method, teacher=teacher)

    def micro_batch_loss(self, model, batch: dict, noise: Noise) -> tuple[torch.Tensor, ModelOutput]:
        """KL(student ‖ target): a mean over a sequence's masked positions, then over sequences."""
        head = self.teacher.get_output_embeddings()
        # 1. hide
        masked = drawn_mask(batch, noise, self.kind)
        state = self.hide(batch, masked, noise.t)
        # 2. what the teacher says of each position when it reveals it
        hidden = self.targets(state, noise)  # (P, D)
        # 3. the student, its logits beside the teacher's: the text itself is no target
        weights = to_device(mean_over_sequences(masked, noise), hidden.device)  # (P,)
        divergence = divergence_from(
            hidden, head.weight, head.bias, weights, self.model.config.mask_token_id, kind="reverse_kl"
        )
        output = model(**state.seen(), **noise.iterations, logits_loss=divergence)
        share = noise.share_of_sequences
        self.record(share, divergence=output.logits_loss / share)
        return output.loss, output

    @torch.no_grad()
    def targets(self, state: NoisedBatch, noise: Noise) -> torch.Tensor:
        """(P, D) input of the teacher's head at each masked position, at the moment when it is revealed.

        The uniforms that masked the positions also reveal them, at the first time whose P(masked) is not above them:
        the states that the teacher sees are those of its ancestral sampler.
        """
        positions, tokens = state.positions, state.input_ids.clone()
        rows, device = positions // tokens.shape[1], tokens.device  # (P,)
        uniforms = noise.uniforms.flatten()[positions]  # (P,)
        waiting, targets = torch.ones(len(positions), dtype=torch.bool), None
        for step in range(self.args.teacher_steps):
            t, after = ((noise.t - k * self.step_size).clamp(min=0) for k in (step, step + 1))
            now = replace(state, input_ids=tokens, t=to_device(t, device))
            with self.accelerator.autocast():  # which only the student is wrapped in
                hidden = denoise(self.teacher, **now.seen()).normed_hidden_state  # (P, D)
            targets = hidden if targets is None else torch.where(to_device(waiting, device)[:, None], hidden, targets)
            revealed = waiting & (uniforms >= self.kind.masked_probability(after)[rows])
            waiting = waiting & ~revealed
            if step < self.args.teacher_steps - 1:  # no pass sees the last draw
                shown = revealed.nonzero().squeeze(1)
                drawn = self._draw_tokens(hidden[to_device(shown, device)], positions[shown], noise)
                tokens.view(-1)[to_device(positions[shown], device)] = drawn
        return targets

    def _draw_tokens(self, hidden: torch.Tensor, positions: torch.Tensor, noise: Noise) -> torch.Tensor:
        """Tokens of the teacher at flat `positions`, each drawn from its sequence's own stream."""
        length, streams = noise.uniforms.shape[1], noise.streams("draw")
        uniforms = torch.cat([torch.rand(length, generator=g, dtype=torch.float64) for g in streams])
        head = self.teacher.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype))
        return draw_tokens(logits, to_device(uniforms[positions], hidden.device), self.model.config.mask_token_id)[0]

    @property
    def step_size(self) -> float:
        """The teacher's step in time, in this round."""
        done = self.state.global_step // self.args.steps_per_round
        return self.args.first_step_size * self.args.teacher_steps ** min(done, self.args.rounds - 1)

    def promote_student(self) -> None:
        """The teacher becomes a copy of the student, with averaged weights if there are any."""
        self._promoted = True
        with self._averaged():
            self.teacher = copy.deepcopy(self.model).eval()

    def save_beside(self, folder: Path) -> None:
        """Also those of the teacher's weights that the student trains; in the first round none are needed."""
        first_round = self.state.global_step < self.args.steps_per_round
        if not first_round:
            self._recorded["weights"].pop("teacher", None)  # the present one is in the checkpoint
        super().save_beside(folder)
        if first_round or not self.args.should_save:
            return
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        teacher = {name: p.detach().contiguous() for name, p in self.teacher.named_parameters() if name in trained}
        save_file(teacher, folder / TEACHER_FILE)

    def _init_training_state(self, *args, **kwargs):
        position = super()._init_training_state(*args, **kwargs)
        if self._promoted and self.state.global_step < self.args.steps_per_round:
            raise ValueError("the teacher of the first round is gone: make a new trainer to train from there again.")
        return position

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / TEACHER_FILE).is_file():
            self._promoted, self.teacher = True, copy.deepcopy(self.model).eval()
            with reading(checkpoint, TEACHER_FILE):
                self.teacher.load_state_dict(load_file(Path(checkpoint) / TEACHER_FILE), strict=False)


class NextRound(TrainerCallback):
    """Changes the teacher between rounds."""

    def __init__(self, trainer: SDTTTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_round == 0 and state.global_step < args.rounds * args.steps_per_round:
            self.trainer.promote_student()
