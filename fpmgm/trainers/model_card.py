# SPDX-License-Identifier: Apache-2.0
"""Fills `fpmgm/model_cards/template.md` with what a run knows. Every number comes from the model or from a file."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import TrainingArguments

from .. import model_cards
from ..model_cards.escape import PLACES, code, with_error
from ..models.kinds import KINDS


if TYPE_CHECKING:
    from peft import PeftConfig

TOKENIZER = "tokenizer_config.json"
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
NO_FILES = ("all_results.json", "train_results.json")  # a copy of the others; the last process alone
TEMPLATE = Path(model_cards.__file__).with_name("template.md")
# Endings of measures that say nothing of the model, or stand beside their value.
NO_RESULTS = ("_runtime", "_per_second", "_preparation_time", "_flos", "_stderr", "epoch", "_delta")


def write_model_card(
    folder: str | Path, model: nn.Module, args: TrainingArguments, steps: int, lineage: dict[str, str] | None = None
) -> Path:
    """Write `README.md` into `folder`, with the numbers of the `*_results.json` files that lie there.

    Args:
        folder (`str` or `Path`): Folder of the exported model.
        model (`nn.Module`): The model, for its configuration and its number of parameters (an adapter's own).
        args (`TrainingArguments`): Arguments of the run.
        steps (`int`): Optimizer steps taken.
        lineage (`dict[str, str]`, *optional*): What it came from and how, in words by name; `"started from"` names a
            model. `None`: nothing is known.

    Returns:
        `Path` of the card.
    """
    folder, config, lineage = Path(folder), model.config, lineage or {}
    kind = KINDS[config.model_type]
    words = kind.name if config.num_fixed_point_layers else kind.explicit_name
    adapter, parameters = next(iter(getattr(model, "peft_config", {}).values()), None), list(model.parameters())
    base = lineage.get("started from")
    if adapter is not None:
        base = adapter.base_model_name_or_path or base
        words = f"A {adapter.peft_type.value} adapter of {code(base) if base else 'an unnamed model'}"
        parameters = [p for p in parameters if p.requires_grad]
    name = getattr(args, "hub_model_id", None) or folder.resolve().name
    tokenizer = name if (folder / TOKENIZER).is_file() else _tokenizer_of(base) if adapter is not None else None
    card = ModelCard.from_template(
        card_data(config.model_type, adapter, base, tokenizer is not None),
        template_path=str(TEMPLATE),
        **PLACES,
        name=name,
        kind=words,
        adapter=adapter,
        tokenizer=tokenizer,
        parameters=f"{sum(getattr(p, 'ds_numel', p.numel()) for p in parameters):,}",  # ZeRO-3's are split
        version=version("fpmgm"),
        config=config,
        lineage=lineage,
        data=args.data_description,
        steps=f"{steps:,}",
        learning_rate=args.learning_rate,
        weights="raw" if args.ema_decay is None else f"exponential moving average, decay {args.ema_decay}",
        results=results_in(folder),
    )
    card.save(folder / "README.md")
    return folder / "README.md"


def results_in(folder: Path) -> dict[str, dict[str, str]]:
    """What evaluations measured, by file and measure, in words; not what training measured of itself."""
    files = sorted(path for path in folder.glob("*_results.json") if path.name not in NO_FILES)
    read = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in files}
    tables = {
        name: {
            measure: with_error(value, values.get(f"{measure}_stderr"))
            for measure, value in values.items()
            if not measure.endswith(NO_RESULTS)
        }
        for name, values in read.items()
    }
    return {name: table for name, table in tables.items() if table}


def _tokenizer_of(base: str | None) -> str | None:
    """Where an adapter's model has its tokenizer; a model on the hub is taken to have one."""
    if base is None or (Path(base).is_dir() and not (Path(base) / TOKENIZER).is_file()):
        return None
    return base


def card_data(model_type: str, adapter: "PeftConfig | None", base: str | None, has_tokenizer: bool) -> ModelCardData:
    """What the hub reads of a model, or of an `adapter`: the task of a pipeline that loads it, and the model on the
    hub that it comes from."""
    kind = KINDS[model_type]
    data = ModelCardData(pipeline_tag=kind.pipeline_tag if has_tokenizer else None, tags=["fpmgm", kind.tag])
    data.library_name = "transformers" if adapter is None else "peft"
    if adapter is not None:
        data.tags.append(adapter.peft_type.value.lower())
    if base is not None and re.fullmatch(HUB_NAME, base) and not Path(base).exists():
        data.base_model, data.base_model_relation = base, "finetune" if adapter is None else "adapter"
    return data
