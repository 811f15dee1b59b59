# SPDX-License-Identifier: Apache-2.0
"""A prompt as a person types it, with blanks, to token ids."""

import re

import torch
from transformers import PreTrainedTokenizerBase

from .text_input import boundary_ids, framing_ids


BLANK = "<|mask|>"  # in prompts, whatever the tokenizer calls it
MOST_BLANKS = 10**6  # more than any model's longest text, and what a page's visitor may ask for at no cost


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, mask_token_id: int, continued: bool = False
) -> torch.Tensor:
    """(1, L) ids of a prompt between BOS and EOS, where there are such, as a whole text is, or, if it is to be
    `continued`, as `tokenizer(prompt)` and training on prompts have it; `<|mask|*N>` stands for N blanks.

    A space before a blank is left out: in text it belongs to the token of the next word, which is to be written.

    Raises:
        `ValueError`: for more than a million blanks in one.
    """
    names = {re.escape(name) for name in (BLANK, tokenizer.mask_token) if name is not None}
    blank = re.compile(rf" ?(?:{'|'.join(names)}|<\|mask\|\*(?P<count>\d+)>)")
    before, behind = framing_ids(tokenizer) if continued else ([token] for token in boundary_ids(tokenizer))
    ids, end = [*before], 0
    for found in blank.finditer(prompt):
        ids += encode_part(tokenizer, prompt[end : found.start()], first=end == 0)
        count = found["count"] or "1"
        if len(count) > 9 or int(count) > MOST_BLANKS:
            raise ValueError(f"`prompt` has a blank of {count[:20]} tokens: give at most {MOST_BLANKS:,}.")
        ids += [mask_token_id] * int(count)
        end = found.end()
    ids += [*encode_part(tokenizer, prompt[end:], first=end == 0), *behind]
    return torch.tensor([[token for token in ids if token is not None]])


def encode_part(tokenizer: PreTrainedTokenizerBase, text: str, first: bool) -> list[int]:
    """Ids of a part of a prompt; what stands behind a blank gets no space of its own, as a text's beginning may."""
    line_end = [] if first else tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer("\n" * (not first) + text, add_special_tokens=False)["input_ids"]
    if ids[: len(line_end)] == line_end:
        return ids[len(line_end) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]
