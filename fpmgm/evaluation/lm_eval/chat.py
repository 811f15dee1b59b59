# SPDX-License-Identifier: Apache-2.0
"""Prompts that a chat template writes."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation_prompt: bool) -> str:
    """The messages in the tokenizer's template, without the system's where the template takes none.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Has a `chat_template`.
        messages (`list[dict]`): `role` and `content` of each.
        generation_prompt (`bool`): End with the beginning of an answer, or else let the last message go on.

    Raises:
        `ValueError`: if the tokenizer has no template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "`apply_chat_template` needs a tokenizer with a `chat_template`: set one and save the tokenizer, or leave "
            "the option out."
        )
    options = {"tokenize": False, "add_generation_prompt": generation_prompt}
    options["continue_final_message"] = not generation_prompt
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError:
        others = [message for message in messages if message["role"] != "system"]
        if len(others) == len(messages):
            raise
        logger.warning_once("The chat template takes no system message: it is left out, as lm-eval does.")
        return tokenizer.apply_chat_template(others, **options)
