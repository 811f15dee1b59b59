# SPDX-License-Identifier: Apache-2.0
"""A text while it is revealed, as HTML: tokens in the colours of their reuse state, residuals of the solver.

Pure functions of numbers and strings to HTML; every text is escaped.
"""

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .models.reuse import REUSE_STATES, reuse_states
from .models.text_input import text_of


WORDS = {
    "given": "prompt",
    "masked": "masked",
    "changed": "revealed by this step",
    "unchanged": "revealed earlier",
    "remasked": "taken back",
}
LEGEND = ("masked", "changed", "unchanged")
UNDER_REUSE = "under reuse 3sr their solutions are partly reused, mostly dropped, and reused"
# Blanks are named with their parents: a page that colours its own spans must not colour them.
STYLE = """
.fp {--fp-masked: #e4e4e7; --fp-changed: #fdba74; --fp-unchanged: #d9f0dc; --fp-remasked: #f5c2d6;
  --fp-line: #c2410c; --fp-earlier: #b6b6bd; --fp-grid: #d4d4d8}
.dark .fp {--fp-masked: #3f3f46; --fp-changed: #b45309; --fp-unchanged: #1f4d2b; --fp-remasked: #7a2548;
  --fp-line: #fb923c; --fp-earlier: #71717a; --fp-grid: #3f3f46}
.fp-text {font-family: ui-monospace, monospace; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere;
  min-height: 9em}
.fp-text span {border-radius: 3px; padding: 1px 0}
.fp-given {font-weight: 600}
.fp .fp-text .fp-masked {background: var(--fp-masked); color: transparent; user-select: none}
.fp-changed {background: var(--fp-changed)}
.fp-unchanged {background: var(--fp-unchanged)}
.fp-remasked {background: var(--fp-remasked)}
.fp-legend {font-size: .8em; margin-top: .6em}
.fp-legend i {display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .35em;
  vertical-align: -.1em; border: 1px solid var(--fp-grid)}
.fp-legend span {margin-right: 1.2em; white-space: nowrap}
.fp-facts {font-size: .85em; margin: .2em 0 .5em}
.fp svg {width: 100%; height: auto; max-height: 180px}
.fp svg text {font: 10px ui-sans-serif, sans-serif; fill: currentColor; opacity: .75}
"""


@dataclass(frozen=True)
class Token:
    """A token to show: its text, and its state, one of `WORDS`."""

    text: str
    state: str


def draw_tokens(tokens: Iterable[Token]) -> str:
    """A text as HTML, masked tokens as blanks of the width of a short word.

    >>> "<b>" in draw_tokens([Token("<b>", "given")])
    False
    """
    spans = [f'<span class="fp-{token.state}">{html.escape(_shown(token))}</span>' for token in tokens]
    return f'<div class="fp"><div class="fp-text">{"".join(spans)}</div></div>'


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, previous: torch.Tensor, ids: torch.Tensor, given: torch.Tensor, mask: int
) -> list[Token]:
    """The tokens of a sequence, each with what happened to it since the step before.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes single tokens.
        previous, ids (`torch.Tensor`): (L,) ids before and after the step.
        given (`torch.Tensor`): (L,) whether a token was given, in a prompt.
        mask (`int`): Id of the mask.
    """
    states = reuse_states(previous, ids, mask).tolist()
    tokens = []
    for token, state, kept in zip(ids.tolist(), states, given.tolist(), strict=True):
        kind = "given" if kept else "masked" if token == mask else REUSE_STATES[state]
        tokens.append(Token("" if token in tokenizer.all_special_ids else text_of(tokenizer, token), kind))
    return tokens


def draw_legend() -> str:
    """What the colours mean."""
    items = [f'<span><i style="background: var(--fp-{state})"></i>{WORDS[state]}</span>' for state in LEGEND]
    return f'<div class="fp"><div class="fp-legend">{"".join(items)}{UNDER_REUSE}</div></div>'


def draw_facts(step: int, num_steps: int, spent: int, budget: int, masked: int) -> str:
    """One line about a step, counted from 1."""
    words = f"step {step} of {num_steps} · {spent} of {budget} block evaluations · {masked} masked"
    return f'<div class="fp"><div class="fp-facts">{words}</div></div>'


def draw_residuals(solves: list[tuple[int, list[float]]], budget: int) -> str:
    """Residuals of the solver as a picture (SVG): a curve for each step, against the block evaluations spent.

    Args:
        solves (`list[tuple[int, list[float]]]`): For each step so far, the block evaluations spent before its first
            iteration and the relative residual of each iteration; an empty list for a step without a solver.
            Empty: before the first step.
        budget (`int`): Block evaluations of the whole plan, the width of the picture.
    """
    width, height, left, bottom = 480, 150, 34, 18
    shown = [r for _, residuals in solves for r in residuals if r > 0 and math.isfinite(r)]
    low, high = (math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))) if shown else (-2, 0)
    high = max(high, low + 1)

    def place(spent: float, residual: float) -> str:
        exponent = min(max(math.log10(max(residual, 1e-30)), low), high)
        x = left + (width - left - 6) * spent / max(budget, 1)
        return f"{x:.1f},{6 + (height - bottom - 6) * (high - exponent) / (high - low):.1f}"

    parts = []
    for exponent in range(low, high + 1) if shown else ():
        x, y = place(0, 10.0**exponent).split(",")
        parts.append(f'<line x1="{x}" x2="{width - 6}" y1="{y}" y2="{y}" stroke="var(--fp-grid)"/>')
        parts.append(f'<text x="{left - 4}" y="{float(y) + 3:.1f}" text-anchor="end">1e{exponent}</text>')
    for i, (spent, residuals) in enumerate(solves):
        colour, known = ("line" if i == len(solves) - 1 else "earlier"), [r for r in residuals if math.isfinite(r)]
        points = " ".join(place(spent + n + 1, r) for n, r in enumerate(known))
        parts.append(f'<polyline points="{points}" fill="none" stroke="var(--fp-{colour})" stroke-width="1.6"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="1.8" fill="var(--fp-{colour})"/>' for x, y in _pairs(points)]
    if shown:
        parts.append(f'<text x="{width - 6}" y="{height - 4}" text-anchor="end">block evaluations, of {budget}</text>')
        parts.append(f'<text x="{left}" y="{height - 4}">relative residual of each iteration</text>')
    else:
        words = "this model has no solver" if solves else "the first step is being computed"
        parts.append(f'<text x="{width // 2}" y="{height // 2}" text-anchor="middle">{words}</text>')
    return f'<div class="fp"><svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg></div>'


def _shown(token: Token) -> str:
    if token.state == "masked":
        return "░░░"
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in token.text)


def _pairs(points: str) -> list[list[str]]:
    return [point.split(",") for point in points.split()]
