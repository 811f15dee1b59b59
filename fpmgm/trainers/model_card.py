# SPDX-License-Identifier: Apache-2.0
"""Fills `fpmgm/model_cards/template.md` with what a run knows. Every number comes from the model or from a file."""

import json
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import TrainingArguments

from .. import model_cards


TEMPLATE = Path(model_cards.__file__).with_name("template.md")


def write_model_card(folder: str | Path, model: nn.Module, args: TrainingArguments, steps: int) -> Path:
    """Write `README.md` into `folder`, with the numbers of the `*_results.json` files that lie there.

    Args:
        folder (`str` or `Path`): Folder of the exported model.
        model (`nn.Module`): The model, for its configuration and its number of parameters.
        args (`TrainingArguments`): Arguments of the run.
        steps (`int`): Optimizer steps taken.

    Returns:
        `Path` of the card.
    """
    folder, config = Path(folder), model.config
    results = {
        path.name: json.loads(path.read_text())
        for path in sorted(folder.glob("*_results.json"))
        if path.name != "all_results.json"  # a copy of the others
    }
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["fpmgm", "masked-diffusion"]),
        template_path=str(TEMPLATE),
        name=getattr(args, "hub_model_id", None) or folder.resolve().name,
        kind="A fixed-point masked diffusion language model" if config.num_fixed_point_layers else "An MDLM",
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
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
