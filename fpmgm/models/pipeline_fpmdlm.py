# SPDX-License-Identifier: Apache-2.0
"""Text from prompts in one call: the task `"masked-generation"` of `transformers.pipeline`."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import Pipeline, PreTrainedTokenizerBase

from .arguments import checked, is_whole, shown
from .configuration_fpmdlm import FPMDLMConfig
from .generation_inputs import ALLOWED
from .prompt import encode_prompt


class FPMDLMPipeline(Pipeline):
    """Writes texts from nothing, behind prompts, or in their blanks.

    `pipeline("masked-generation", model=…)` makes one; so does `FPMDLMPipeline(model, tokenizer)`. Saved by its
    `save_pretrained` or `push_to_hub`, it works without fpmgm, with `trust_remote_code=True`.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion, FPMDLMPipeline
    >>> from fpmgm.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["the cat sat on the mat"], 258)
    >>> config = FPMDLMConfig(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, hidden_size=8,
    ...                       num_attention_heads=2, intermediate_size=16, max_position_embeddings=24)
    >>> write = FPMDLMPipeline(FPMDLMForMaskedDiffusion(config), tokenizer, device="cpu")
    >>> texts = write(["the cat<|mask|*8> mat", "the"], max_new_tokens=4, budget=24, seed=0)
    >>> texts[0][0]["generated_text"].startswith("the cat"), texts[1][0]["block_evaluations"]
    (True, 24)

    ```
    """

    _load_tokenizer = True

    def __call__(
        self, prompts: str | Iterable[str] = "", *, seed: int | None = None, **options: Any
    ) -> list[dict] | list[list[dict]] | Iterator[list[dict]]:
        """Texts of one prompt or several.

        Args:
            prompts (`str` or `Iterable[str]`, defaults to `""`): Texts with `<|mask|>` or the tokenizer's mask where
                a token is wanted, `<|mask|*20>` for 20 of them. `""`: a text from nothing, as long as the model's
                longest. A dataset or a generator is read as it is needed.
            seed (`int`, *optional*): Prompt i draws from `seed + i`, in whatever batch it is. `None`: PyTorch's
                global generator.
            options: `batch_size`, the prompts of one call of the model, 1 if left out (more need a padding token, any:
                `pipeline.tokenizer.pad_token = pipeline.tokenizer.eos_token`); `max_new_tokens`, that many blanks
                behind each prompt; and any field of [`MGMGenerationConfig`].

        Returns:
            `list[dict]`: One entry with `generated_text`, without special tokens, and `block_evaluations`, what the
                text has cost; for several prompts a list, or what yields them, of such lists.

        Raises:
            `ValueError`: for what is no text, a prompt without blanks and without `max_new_tokens`, and as `generate`.
        """
        if seed is not None and not is_whole(seed):
            raise ValueError(f"`seed`={shown(seed)} must be a whole number, or None.")
        if isinstance(prompts, str):
            return super().__call__((prompts, seed), **options)
        numbered = ((prompt, None if seed is None else seed + i) for i, prompt in enumerate(prompts))
        return super().__call__(list(numbered) if isinstance(prompts, list | tuple) else numbered, **options)

    def _sanitize_parameters(self, max_new_tokens: int | None = None, **options: Any) -> tuple[dict, dict, dict]:
        before = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        return checked(ALLOWED, before), options, {}

    def preprocess(self, numbered: tuple[str, int | None], max_new_tokens: int | None = None) -> dict:
        """(1, L) ids of a prompt and its blanks, and its seed."""
        prompt, seed = numbered
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(
                f"`seed`={shown(seed)}, of prompt i `seed + i`, must fit into 64 bits: give a smaller one."
            )
        ids = read_prompt(self.tokenizer, prompt, max_new_tokens, self.model.config)
        seeds = {} if seed is None else {"seeds": torch.tensor([[seed]])}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seeds}

    def _forward(self, inputs: dict, **options: Any) -> dict:
        real, seeds = inputs["attention_mask"].bool(), inputs.get("seeds")
        out = self.model.generate(
            inputs["input_ids"],
            attention_mask=None if real.all() else real,
            seed=None if seeds is None else seeds.flatten().tolist(),
            return_dict_in_generate=True,
            **options,
        )
        kept = real[:, : out.sequences.shape[1]]  # cut under `stop_at_eos`
        return {"sequences": out.sequences, "kept": kept, "spent": out.block_evaluations_per_sequence}

    def postprocess(self, written: dict) -> list[dict]:
        """The text of a row without its padding."""
        ids = written["sequences"][0][written["kept"][0]]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return [{"generated_text": text, "block_evaluations": int(written["spent"][0])}]


def read_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, max_new_tokens: int | None, config: FPMDLMConfig
) -> torch.Tensor:
    """(1, L) ids of a prompt with its blanks, and `max_new_tokens` more behind it."""
    if not isinstance(prompt, str):
        raise ValueError(f"`prompts` holds {shown(prompt)}, of type {type(prompt).__name__}: give texts.")
    mask = config.mask_token_id
    if not prompt:
        return torch.full((1, max_new_tokens or config.max_position_embeddings), mask)
    ids = encode_prompt(tokenizer, prompt, mask, continued=max_new_tokens is not None)
    ids = torch.cat([ids, torch.full((1, max_new_tokens or 0), mask)], dim=1)
    if not (ids == mask).any():
        raise ValueError(
            f"`prompts`: {shown(prompt)} has no blank: write `<|mask|*20>` where 20 tokens are wanted, or give "
            "`max_new_tokens`."
        )
    return ids


__all__ = ["FPMDLMPipeline"]
