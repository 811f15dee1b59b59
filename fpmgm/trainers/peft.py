# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT: what LoRA adapts by default, and what does not go well with a fixed point.

PEFT is imported only where it is used. Nothing in `models` knows of it: an adapted matrix inside F is adapted at every
iteration, and the solver and its gradient are those of the merged matrix.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from torch import nn
from transformers.utils import is_peft_available, logging

from ..models.kinds import KINDS


if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

logger = logging.get_logger(__name__)


@dataclass
class LoraArguments:
    """Whether to train low-rank adapters instead of the weights; the names are those of TRL's recipes."""

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters on frozen weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters; 0 keeps F one map for all iterations."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt, or all-linear; null: the projections of the blocks."}
    )

    def __post_init__(self):
        given = [f.name for f in fields(self) if f.name != "use_peft" and getattr(self, f.name) != f.default]
        if given and not self.use_peft:
            raise ValueError(f"{given} do nothing without `use_peft`: add --use_peft, or leave them out.")


def register_target_modules() -> None:
    """Let `LoraConfig()` without `target_modules` mean those of the model's [`Kind`]; without PEFT, do nothing.

    `import fpmgm.trainers` calls it. What a user has registered for a model type stays.
    """
    if is_peft_available():
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

        for model_type, kind in KINDS.items():
            defaults.setdefault(model_type, list(kind.lora_target_modules))


def lora_config(arguments: LoraArguments) -> "LoraConfig | None":
    """The `peft.LoraConfig` of a recipe's options; `None` without `use_peft`.

    Raises:
        `ImportError`: if PEFT is not installed.
    """
    if not arguments.use_peft:
        return None
    if not is_peft_available():
        raise ImportError("`use_peft` needs peft: pip install 'fpmgm[train]'")
    from peft import LoraConfig

    modules = arguments.lora_target_modules
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
    )


def with_adapter(model: nn.Module, peft_config: "PeftConfig | None" = None) -> nn.Module:
    """`model` frozen, with a new adapter that trains.

    Warns where dropout of an adapter makes F another map at each iteration.

    Args:
        model (`PreTrainedModel`): Changed in place.
        peft_config (`peft.PeftConfig`, *optional*): The adapter. `None`: `model` as it is.

    Returns:
        `peft.PeftModel` around `model`, or `model`.

    Raises:
        `ValueError`: if `model` has adapters already, or `peft_config` adapts no weights.
    """
    if peft_config is not None:
        from peft import get_peft_model

        if hasattr(model, "peft_config"):
            raise ValueError(
                f"`peft_config` is given, but the model has the adapter(s) {list(model.peft_config)} already: leave "
                "`peft_config` out to train these, or give `model.merge_and_unload()`."
            )
        if peft_config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` of {peft_config.peft_type.value} puts tokens of its own before the text, for which a "
                "masked model has no place: give one that adapts weights, such as `LoraConfig`."
            )
        model = get_peft_model(model, peft_config)

    stack = getattr(model, "fixed_point", None) or nn.Module()
    dropout = max((layer.p for layer in stack.modules() if isinstance(layer, nn.Dropout)), default=0)
    if dropout > 0:  # an adapter's: the blocks' own dropout keeps its masks over the iterations
        logger.warning(
            f"`lora_dropout`={dropout} draws a new mask at each iteration of the fixed-point stack: F is then not one "
            "map and its residual stops falling. Use `lora_dropout=0`."
        )
    return model
