# SPDX-License-Identifier: Apache-2.0
"""A picture of one text being written: which tokens a step reveals."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..models.generation_mgm import GenerationStep
from ..models.text_input import text_of
from .axes import new_figure, save


COLUMNS = 96  # characters per line of text
SNAPSHOTS = 6  # steps to show, spread over all; the last is among them
COLORS = {"masked": "#d9d9d9", "revealed": "#f4a259", "visible": "#e3f0e3"}


def plot_denoising(steps: list[GenerationStep], tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Path:
    """Draw the first sequence after several steps: grey is masked, orange was revealed by the step, green earlier.

    Args:
        steps (`list[GenerationStep]`): Collected by `generate(callback=steps.append)`.
        tokenizer (`PreTrainedTokenizerBase`): Decodes single tokens.
        path (`str` or `Path`): Picture to write; the suffix is the format.

    Returns:
        `Path` of the picture.
    """
    count = min(SNAPSHOTS, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    panels = [_tokens(step, tokenizer) for step in chosen]
    lines = [_wrap(panel) for panel in panels]
    height = sum(len(panel) + 1.6 for panel in lines)
    figure = new_figure(COLUMNS * 0.092, height * 0.23, layout=None)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, COLUMNS + 1), ylim=(height, 0))
    axes.axis("off")
    y = 1.0
    for step, panel in zip(chosen, lines, strict=True):
        masked = sum(kind == "masked" for line in panel for _, kind, _ in line)
        title = f"step {step.step + 1} of {step.num_steps}   t = {step.time:.2f}   {masked} tokens masked"
        axes.text(0, y, title, fontsize=9, weight="bold", va="center")
        for line in panel:
            y += 1
            for text, kind, x in line:
                axes.barh(y, len(text), left=x, height=0.86, color=COLORS[kind])
                axes.text(x, y, text, fontsize=10.4, family="monospace", va="center")
        y += 1.6
    return save(figure, path, dpi=160)


def _tokens(step: GenerationStep, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(text, kind) of each position; a masked token is shown as blanks of the width of a short word."""
    ids, revealed = step.sequences[0].tolist(), step.revealed[0].tolist()
    tokens = []
    for token, new in zip(ids, revealed, strict=True):
        if token == tokenizer.mask_token_id:
            tokens.append(("   ", "masked"))
        else:
            text = "⏎" if token in tokenizer.all_special_ids else text_of(tokenizer, token)
            text = "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎"))
            tokens.append((text.replace("$", r"\$"), "revealed" if new else "visible"))
    return tokens


def _wrap(tokens: list[tuple[str, str]]) -> list[list[tuple[str, str, int]]]:
    """Lines of (text, kind, column)."""
    lines, column = [[]], 0
    for text, kind in tokens:
        if column + len(text) > COLUMNS:
            lines.append([])
            column = 0
        lines[-1].append((text, kind, column))
        column += len(text)
    return lines
