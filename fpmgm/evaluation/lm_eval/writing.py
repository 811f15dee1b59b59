# SPDX-License-Identifier: Apache-2.0
"""Continuations of prompts: masks after each prompt are filled by the model's `generate`."""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from ...models.text_input import boundary_ids, special_ids


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


@dataclass
class Written:
    """What texts took so far: how many there are, their tokens, steps and block evaluations, and the seconds of
    `generate`."""

    texts: int = 0
    tokens: int = 0
    steps: int = 0
    block_evaluations: int = 0
    seconds: float = 0.0

    def add(self, out: Any, seconds: float) -> None:
        """Count a call of `generate`."""
        self.texts += len(out.sequences)
        self.tokens += int(out.lengths.sum())
        self.steps += int(out.num_steps_per_sequence.sum())
        self.block_evaluations += int(out.block_evaluations_per_sequence.sum())
        self.seconds += seconds

    def report(self) -> dict[str, float]:
        """Means over the texts and steps. Empty: nothing was written."""
        if not self.texts:
            return {}
        return {
            "texts": self.texts,
            "num_steps": self.steps / self.texts,
            "block_evaluations": self.block_evaluations / self.texts,
            "tokens_per_step": self.tokens / max(1, self.steps),
            "tokens_per_second": self.tokens / self.seconds,
        }


def write(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, jobs: list[Job], written: Written) -> list[str]:
    """The texts of jobs that one call of `generate` can do; a text does not depend on the others. What they took is
    added to `written`."""
    starts = [len(job.prompt) for job in jobs]
    ends = [start + job.new_tokens for start, job in zip(starts, jobs, strict=True)]
    input_ids = torch.zeros(len(jobs), max(ends), dtype=torch.long)
    for row, job, start, end in zip(input_ids, jobs, starts, ends, strict=True):
        row[:start], row[start:end] = torch.tensor(job.prompt), model.config.mask_token_id
    real = (torch.arange(max(ends)) < torch.tensor(ends)[:, None]).long()
    began, options = time.perf_counter(), jobs[0].options
    if options.get("stop_at_eos") and "eos_token_id" not in options:
        options = {**options, "eos_token_id": boundary_ids(tokenizer)[1]}
    out = model.generate(
        input_ids,
        attention_mask=None if real.all() else real,
        seed=[job.seed for job in jobs],
        **{**options, "return_dict_in_generate": True},
    )
    tokens = out.sequences.tolist()
    if hasattr(out, "lengths"):  # a checkpoint's own code may be older
        written.add(out, time.perf_counter() - began)
    return [
        read(tokenizer, row[start:end], job.until)
        for row, job, start, end in zip(tokens, jobs, starts, ends, strict=True)
    ]


def read(tokenizer: PreTrainedTokenizerBase, tokens: list[int], until: list[str]) -> str:
    """The text before the first end-of-text token and the first string of `until`, which may begin with the name of
    another special token, such as `<|im_end|>`: it stands in no text."""
    end, special = boundary_ids(tokenizer)[1], special_ids(tokenizer)
    for place, token in enumerate(tokens):
        ends = token in special and tokenizer.decode(tokens[place:]).startswith(tuple(until))
        if token == end or ends:
            tokens = tokens[:place]
            break
    return postprocess_generated_text(tokenizer.decode(tokens, skip_special_tokens=True), until, None)
