# SPDX-License-Identifier: Apache-2.0
"""Fills `fpmgm/model_cards/template.md` with what a run knows. Every number comes from the model or from a file."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import TrainingArguments

from .. import model_cards


if TYPE_CHECKING:
    from peft import PeftConfig

TEMPLATE = Path(model_cards.__file__).with_name("template.md")
# By `model_type`: a model with fixed-point layers, one without, and the hub's task and tag.
KINDS = {
    "fpmdlm": (
        "A fixed-point masked diffusion language model", "An MDLM", "text-generation", "masked-diffusion"
    ),
    "fpmaskgit": (
        "A fixed-point masked generative image model", "A MaskGIT", "unconditional-image-generation", "maskgit"
    ),
}  # fmt: skip


def write_model_card(folder: str | Path, model: nn.Module, args: TrainingArguments, steps: int) -> Path:
    """Write `README.md` into `folder`, with the numbers of the `*_results.json` files that lie there.

    Args:
        folder (`str` or `Path`): Folder of the exported model.
        model (`nn.Module`): The model, for its configuration and its number of parameters (an adapter's own).
        args (`TrainingArguments`): Arguments of the run.
        steps (`int`): Optimizer steps taken.

    Returns:
        `Path` of the card.
    """
    folder, config = Path(folder), model.config
    fixed_point, explicit, *_ = KINDS[config.model_type]
    kind = fixed_point if config.num_fixed_point_layers else explicit
    adapter, parameters = next(iter(getattr(model, "peft_config", {}).values()), None), list(model.parameters())
    if adapter is not None:
        base = adapter.base_model_name_or_path
        kind = f"A {adapter.peft_type.value} adapter of {f'`{base}`' if base else 'an unnamed model'}"
        parameters = [p for p in parameters if p.requires_grad]
    results = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*_results.json"))
        if path.name != "all_results.json"  # a copy of the others
    }
    card = ModelCard.from_template(
        card_data(config.model_type, adapter),
        template_path=str(TEMPLATE),
        name=getattr(args, "hub_model_id", None) or folder.resolve().name,
        kind=kind,
        adapter=adapter,
        parameters=f"{sum(getattr(p, 'ds_numel', p.numel()) for p in parameters):,}",  # ZeRO-3's are split
        version=version("fpmgm"),
        config=config,
        data=args.data_description,
        steps=f"{steps:,}",
        learning_rate=args.learning_rate,
        weights="raw" if args.ema_decay is None else f"exponential moving average, decay {args.ema_decay}",
        results=results,
    )
    card.save(folder / "README.md")
    return folder / "README.md"


def card_data(model_type: str, adapter: "PeftConfig | None") -> ModelCardData:
    """What the hub reads of a model, or of an `adapter` and the model on the hub that it belongs to."""
    *_, task, tag = KINDS[model_type]
    data = ModelCardData(pipeline_tag=task, tags=["fpmgm", tag])
    data.library_name = "transformers" if adapter is None else "peft"
    if adapter is not None:
        data.tags.append(adapter.peft_type.value.lower())
        base = adapter.base_model_name_or_path
        data.base_model = base if base and not Path(base).exists() else None
    return data
