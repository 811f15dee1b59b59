# SPDX-License-Identifier: Apache-2.0
"""What the configurations of all kinds of models share: fields, and what is checked of them."""

from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from .arguments import checked, flag, list_of, nearest, number, one_of, shown, whole
from .budget import MOST_BLOCK_EVALUATIONS


logger = logging.get_logger(__name__)

INPUT_INJECTIONS = ("mlp", "linear", "diagonal", "none")
INJECTION_INITS = ("contraction", "identity")
DERIVED = {"num_hidden_layers": "`num_pre_layers` + `num_fixed_point_layers` + `num_post_layers`"}

# More is a damaged file, not a model.
SIZE = whole(1, 2**24)
LAYERS = whole(0, 1000, "blocks")
PROBABILITY = number(0, 1, "[)")
EPSILON = number(0, 1, "()")

# What the fields that all models have may be.
SHARED_FIELDS = {
    "hidden_size": SIZE,
    "num_attention_heads": SIZE,
    "intermediate_size": SIZE,
    "dropout": PROBABILITY,
    "num_pre_layers": LAYERS,
    "num_fixed_point_layers": LAYERS,
    "num_post_layers": LAYERS,
    "input_injection": one_of(INPUT_INJECTIONS),
    "injection_init": one_of(INJECTION_INITS),
    "num_fixed_point_iterations": whole(1, MOST_BLOCK_EVALUATIONS),
    "no_grad_iterations": list_of(whole(0, MOST_BLOCK_EVALUATIONS), 2, 2),
    "grad_iterations": list_of(whole(1, MOST_BLOCK_EVALUATIONS), 2, 2),
    "tie_word_embeddings": flag(),
}
# What a configuration has beside its fields: what transformers reads, and where a checkpoint comes from.
OF_TRANSFORMERS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "layer_map",
    "model_type",
    "per_layer_config",
    "quantization_config",
    "rope_scaling",
    *dir(PreTrainedConfig),
    *GenerationConfig().to_dict(),
}


class MGMConfig(PreTrainedConfig):
    """The fields that every kind of model has; a kind adds its own, and its defaults.

    `num_classes` and `num_register_tokens` are 0 where a kind has neither. `layer_map` is no field: the layers of a
    teacher that became the stacks of a converted model.
    """

    keys_to_ignore_at_inference = [
        "last_hidden_state",
        "fixed_point_state",
        "residuals",
        "block_evaluations",
        "masked_accuracy",
    ]
    num_classes = 0
    num_register_tokens = 0
    layer_map = None

    dropout: float = 0.1
    num_pre_layers: int = 1
    num_fixed_point_layers: int = 1
    num_post_layers: int = 1
    input_injection: str = "mlp"
    injection_init: str = "contraction"
    num_fixed_point_iterations: int = 6
    no_grad_iterations: list[int] | None = None
    grad_iterations: list[int] | None = None

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that describe the architecture, not transformers' own."""
        own = {*MGMConfig.__annotations__, *cls.__annotations__}
        return [field.name for field in fields(cls) if field.name in own]

    @property
    def is_looped(self) -> bool:
        """Whether F is told of its input by the start alone, so that it must begin anew for each input."""
        return self.num_fixed_point_layers > 0 and self.input_injection == "none"

    @property
    def can_reuse(self) -> bool:
        """Whether a step can start from the last one's solution: F has layers, and is told of its input besides."""
        return self.num_fixed_point_layers > 0 and not self.is_looped

    @property
    def num_hidden_layers(self) -> int:
        """Distinct blocks of the model."""
        return self.num_pre_layers + self.num_fixed_point_layers + self.num_post_layers


def check_fields(config: PreTrainedConfig, allowed: dict, derived: dict[str, str], further: dict[str, Any]) -> None:
    """Hold a configuration against what its fields may be, and what they may be together.

    Args:
        config (`PreTrainedConfig`): Its fields become what the code wants.
        allowed (`dict`): What each field may be.
        derived (`dict[str, str]`): Names that follow from the fields, and how.
        further (`dict`): What was given beside the fields.

    Raises:
        `ValueError`: names the field.
    """
    if config.no_grad_iterations is None:
        config.no_grad_iterations = [0, 0 if config.input_injection == "none" else 4]
    config.grad_iterations = [3, 6] if config.grad_iterations is None else config.grad_iterations
    for name, source in derived.items():
        if name in further:
            raise ValueError(f"`{name}`={shown(further[name])} cannot be set: it is {source}.")
    check_unknown(config, further)
    for name, value in checked(allowed, {name: getattr(config, name) for name in allowed}).items():
        setattr(config, name, value)
    if config.num_hidden_layers == 0:
        raise ValueError("`num_pre_layers`, `num_fixed_point_layers` and `num_post_layers` are all 0: give one block.")
    if config.input_injection in ("diagonal", "none") and config.injection_init == "identity":
        raise ValueError(
            f"`injection_init`='identity' cannot be had with `input_injection`={config.input_injection!r}: the share "
            "of the state in 'diagonal' stays below 1, and 'none' has no share. Use 'contraction'."
        )
    for name in ("no_grad_iterations", "grad_iterations"):
        low, high = getattr(config, name)
        if low > high:
            raise ValueError(
                f"`{name}`={[low, high]} must be two whole numbers [low, high] with low <= high: each training step "
                "draws its number of iterations from this range."
            )
    if config.is_looped and config.no_grad_iterations != [0, 0]:
        raise ValueError(
            f"`no_grad_iterations`={config.no_grad_iterations} with `input_injection`='none': the gradient reaches "
            "the pre-stack through the start alone, which they would cut off. Give [0, 0]."
        )


def check_unknown(config: PreTrainedConfig, further: dict[str, Any]) -> None:
    """Refuse a misspelt field, and warn of a name that no field has.

    A saved configuration is never refused: another version may have written it.

    Raises:
        `ValueError`: for a name near that of a field.
    """
    known = [field.name for field in fields(config)]
    for name in sorted(further.keys() - OF_TRANSFORMERS):
        near = nearest(name, known)
        unknown = f"`{name}`={shown(further[name])} is no field of {type(config).__name__}"
        if near is not None and config.transformers_version is None:
            raise ValueError(f"{unknown}: did you mean `{near}`?")
        if not name.startswith("_"):
            logger.warning_once(
                f"{unknown}{f' (`{near}` is)' if near else ''}, and changes nothing: leave it out. It is kept as an "
                "attribute."
            )
