# SPDX-License-Identifier: Apache-2.0
"""Texts that end where they say so: nothing is written behind the first end of text, and nothing of it is returned.

Positions behind it stay masked, which changes nothing for a denoiser that is exact. What the caller gave behind it is
cut off too.

Shapes: B batch, L length, P candidate positions of a step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from .arguments import shown
from .generation_config_mgm import MGMGenerationConfig
from .reveal import RevealTask, Turn
from .transfer import to_device


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class StopAtEnd:
    """A `rule` of revealing whose rows are finished when all is written up to their first end of text.

    Args:
        rule: Of the `task`.
        task ([`RevealTask`]): What is to be written, and what is no padding.
        ends (`list[int]`): Ids that end a text. One that the caller gave, as a prompt's beginning, ends none.
        filler (`int`): What stands behind an end in the result.
    """

    rule: Any
    task: RevealTask
    ends: list[int]
    filler: int

    @property
    def clock(self):
        """That of the rule."""
        return self.rule.clock

    def behind(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) bool on the CPU: what is behind a row's first written end of text in `tokens` (B, L)."""
        ended = self.task.wanted & torch.isin(tokens.cpu(), torch.tensor(self.ends, device="cpu"))
        return ended.cumsum(dim=1) > ended.long()

    def turn(self, step: int, tokens: torch.Tensor) -> Turn:
        """The rule's before each end: what is behind it will not be written, and the rows with nothing to write before
        it are finished."""
        tokens = tokens.cpu()
        (positions, unfinished, waiting), behind = self.rule.turn(step, tokens), self.behind(tokens)
        positions = positions[~behind.flatten()[positions]]
        left = (self.task.still_masked(tokens) & ~behind).any(dim=1)
        return Turn(positions, unfinished & left, waiting | behind)

    def write(self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor | None):
        """As the rule does."""
        return self.rule.write(step, tokens, positions, logits)

    def masked(self, step: int, tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """As the rule says: to end a text writes nothing."""
        return self.rule.masked(step, tokens, before)

    def cut(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokens` (B, L) with the filler behind each end, without the columns that no row needs, and how many of each
        row's are written, (B,) on the CPU."""
        task = self.task
        kept = task.real & ~self.behind(tokens)
        written = (tokens.cpu() != task.mask_token_id) & task.wanted & kept
        length = int(kept.any(dim=0).nonzero().max()) + 1
        filled = tokens.masked_fill(to_device(task.real & ~kept, tokens.device), self.filler)
        return filled[:, :length], written.sum(dim=1)


def known_ends(config: MGMGenerationConfig, model_config: Any) -> list[int]:
    """The ids that end a text, by the generation configuration or else the model's. Empty: neither names one."""
    ends = config.eos_token_id if config.eos_token_id is not None else getattr(model_config, "eos_token_id", None)
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def read_ends(config: MGMGenerationConfig, model_config: Any) -> tuple[list[int], int]:
    """The ids that end a text, and what stands behind one.

    Raises:
        `ValueError`: if there is none, or one that the model cannot write.
    """
    ends = known_ends(config, model_config)
    if not ends:
        raise ValueError(
            "`stop_at_eos`=True needs to know what ends a text: give `eos_token_id`, such as "
            "`eos_token_id=tokenizer.eos_token_id`."
        )
    for end in ends:
        if end >= model_config.vocab_size or end == model_config.mask_token_id:
            raise ValueError(
                f"`eos_token_id`={shown(config.eos_token_id)} must be a token that the model can write: an id below "
                f"`vocab_size`={model_config.vocab_size} that is not the mask's, {model_config.mask_token_id}."
            )
    padding = (config.pad_token_id, getattr(model_config, "pad_token_id", None), ends[0])
    return ends, next(token for token in padding if token is not None)


def warn_of_ended_prompts(tokens: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor, ends: list[int]) -> None:
    """Warn where the last token before the first of `wanted` (B, L) ends a text that has begun before it: tokenizers
    of BERT's kind, among others, put it there."""
    given = real & (wanted.cumsum(dim=1) == 0)  # (B, L) the prompt
    last = given & (given.flip(1).cumsum(dim=1).flip(1) == 1)
    ended = (last & torch.isin(tokens, torch.tensor(ends, device="cpu"))).any(dim=1) & (given.sum(dim=1) > 1)
    if ended.any():
        logger.warning_once(
            f"`input_ids` end with an end of text, one of {shown(ends)}, in {int(ended.sum())} row(s): behind it "
            "another text begins. To go on with the prompt, leave that token out: "
            "`tokenizer(prompts, add_special_tokens=False, …)`."
        )
