# SPDX-License-Identifier: Apache-2.0
"""A text that reveals itself in a notebook: plain HTML, no widget, saved with the notebook."""

import itertools

import torch
from transformers import PreTrainedTokenizerBase

from .models.ledger import GenerationStep
from .reveal_html import STYLE, draw_legend, draw_tokens, tokens_of


NUMBERS = itertools.count()  # of animations on a page, whose styles must not meet


class RevealAnimation:
    """Passed as `generate(callback=...)`, collects the steps; the last line of a cell, it shows them again and again.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes single tokens; its mask token marks what is not yet written.
        row (`int`, defaults to 0): Sequence of the batch.
        seconds_per_step (`float`, defaults to 0.25): How long a step is shown.
        hold (`float`, defaults to 3.0): How long the finished text is.

    Raises:
        `ValueError`: if the tokenizer has no mask token.

    Example:

    ```python
    >>> animation = RevealAnimation(tokenizer)  # doctest: +SKIP
    >>> model.generate(budget=96, seed=0, callback=animation)  # doctest: +SKIP
    >>> animation  # doctest: +SKIP

    ```
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, row: int = 0, seconds_per_step: float = 0.25, hold: float = 3.0
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError("`tokenizer` has no mask token: use the one that the model was trained with.")
        self.tokenizer, self.row, self.seconds_per_step, self.hold = tokenizer, row, seconds_per_step, hold
        self.states: list[torch.Tensor] = []  # (L,) ids after each step
        self.last = -1  # number of the latest step

    def __call__(self, step: GenerationStep) -> None:
        """Note a step; the first of another run drops those of the run before."""
        mask, ids = self.tokenizer.mask_token_id, step.sequences[self.row].cpu()
        revealed = step.revealed[self.row].cpu()
        # Idle steps are not shown, so that the first one here may have any number.
        written = bool(self.states) and bool((self.states[-1] != mask).all())
        if not self.states or step.step <= self.last or (written and revealed.any()):
            before = torch.where(revealed, mask, ids)
            self.states, self.given = [before], before != mask
        self.last = step.step
        self.states.append(ids)

    def _repr_html_(self) -> str:
        """The animation, or what to do where nothing has been collected."""
        if not self.states:
            return "Nothing was revealed yet: <code>model.generate(callback=animation)</code>"
        mask, number = self.tokenizer.mask_token_id, next(NUMBERS)
        pairs = zip([self.states[0], *self.states], self.states, strict=False)
        frames = [draw_tokens(tokens_of(self.tokenizer, old, new, self.given, mask)) for old, new in pairs]
        total = self.seconds_per_step * (len(frames) - 1) + self.hold
        shown, held = (100 * seconds / total for seconds in (self.seconds_per_step, self.hold))
        style = [
            f".fp-all-{number} {{display: grid}}",
            f".fp-all-{number} > div {{grid-area: 1 / 1; visibility: hidden}}",
        ]
        style += [
            f"@keyframes fp-{name}-{number} {{0% {{visibility: visible}} {end:.3f}%, 100% {{visibility: hidden}}}}"
            for name, end in (("step", shown), ("last", held))
        ]
        parts = []
        for i, frame in enumerate(frames):
            name, delay = ("last" if i == len(frames) - 1 else "step"), self.seconds_per_step * i - total
            parts.append(
                f'<div style="animation: fp-{name}-{number} {total:.3f}s steps(1) {delay:.3f}s infinite">{frame}</div>'
            )
        style = f"<style>{STYLE}{chr(10).join(style)}</style>"
        return f'{style}<div class="fp-all-{number}">{"".join(parts)}</div>{draw_legend()}'
