# SPDX-License-Identifier: Apache-2.0
"""Continuations of prompts: masks after each prompt are filled by the model's `generate`."""

from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from ...models.text_input import boundary_ids


class Job(NamedTuple):
    """A text to write: `prompt` ids, then `new_tokens` masks, cut before a string of `until`.

    `number` is its place among the requests, `options` are arguments of `generate`.
    """

    number: int
    prompt: list[int]
    new_tokens: int
    until: list[str]
    options: dict[str, Any]
    seed: int

    @property
    def batched_with(self) -> str:
        """Equal for jobs that one call of `generate` can do."""
        return repr((self.new_tokens, sorted(self.options.items())))


def write(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, jobs: list[Job]) -> list[str]:
    """The texts of jobs that one call of `generate` can do; a text does not depend on the others."""
    starts = [len(job.prompt) for job in jobs]
    ends = [start + job.new_tokens for start, job in zip(starts, jobs, strict=True)]
    input_ids = torch.zeros(len(jobs), max(ends), dtype=torch.long)
    for row, job, start, end in zip(input_ids, jobs, starts, ends, strict=True):
        row[:start], row[start:end] = torch.tensor(job.prompt), model.config.mask_token_id
    real = (torch.arange(max(ends)) < torch.tensor(ends)[:, None]).long()
    tokens = model.generate(
        input_ids,
        attention_mask=None if real.all() else real,
        seed=[job.seed for job in jobs],
        **jobs[0].options,
    ).tolist()
    return [
        read(tokenizer, row[start:end], job.until)
        for row, job, start, end in zip(tokens, jobs, starts, ends, strict=True)
    ]


def read(tokenizer: PreTrainedTokenizerBase, tokens: list[int], until: list[str]) -> str:
    """The text before the first end-of-text token and the first string of `until`."""
    end = boundary_ids(tokenizer)[1]
    if end in tokens:
        tokens = tokens[: tokens.index(end)]
    return postprocess_generated_text(tokenizer.decode(tokens, skip_special_tokens=True), until, None)
