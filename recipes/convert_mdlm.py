# SPDX-License-Identifier: Apache-2.0
"""Turn a pretrained MDLM or MaskGIT into a fixed-point model and adapt it in a short run, with it as teacher.

A distilled teacher (SDTT, DiDi-Instruct) is read like an MDLM.

    accelerate launch recipes/convert_mdlm.py --config recipes/configs/convert_owt.yaml
    python recipes/convert_mdlm.py --config recipes/configs/convert_small.yaml \\
        --model_name_or_path outputs/mdlm_small --text_files my_text.txt
    accelerate launch recipes/convert_mdlm.py --config recipes/configs/convert_imagenette.yaml --codes_dir codes
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed

from fpmgm import convert_to_fixed_point
from fpmgm.analysis import plot_similarity
from fpmgm.command_line import given, parse_arguments
from fpmgm.conversion import PAPER_MAP, auto_layer_map
from fpmgm.trainers import ConversionConfig, ConversionTrainer
from fpmgm.trainers.lock import hold_folder
from fpmgm.trainers.peft import LoraArguments
from image_data import CodesArguments
from text_data import DataArguments
from train_and_export import Rows, StartArguments, go_on


@dataclass
class ConvertArguments:
    """Which layers of the teacher become which stack of the student."""

    layer_map: str = field(
        default="paper", metadata={"help": "paper (1/6/12), auto (by linear CKA), or lists like 1,2/6/12."}
    )
    num_pre_layers: int = field(default=1, metadata={"help": "Layers of the pre-stack, for auto."})
    num_fixed_point_layers: int = field(default=1, metadata={"help": "Layers of the shared stack, for auto."})
    num_post_layers: int = field(default=1, metadata={"help": "Layers of the post-stack, for auto."})
    initialize: bool = field(default=True, metadata={"help": "Copy the teacher's weights; false: a fresh student."})
    input_injection: str = field(
        default="diagonal", metadata={"help": "How the shared stack sees its input: diagonal, linear, mlp."}
    )
    cka_blocks: int = field(default=64, metadata={"help": "Blocks or images by which layers are compared, for auto."})

    def __post_init__(self):
        of_auto = ("num_pre_layers", "num_fixed_point_layers", "num_post_layers", "cka_blocks")
        idle = {name: value for name, value in given(self).items() if name in of_auto}
        if idle and self.layer_map != "auto":
            raise ValueError(f"{idle} does nothing where `layer_map`={self.layer_map!r}: give auto, or leave it out.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Convert, adapt, evaluate, export; returns the metrics before and after."""
    types = (StartArguments, DataArguments, CodesArguments, ConvertArguments, LoraArguments, ConversionConfig)
    start, text, codes, convert, lora, args = parse_arguments(types, __doc__, argv)

    def prepare(teacher: PreTrainedModel, rows: Rows) -> tuple[type, dict, dict]:
        layer_map = choose_layers(convert, teacher, rows.validation, Path(args.output_dir))
        set_seed(args.seed)  # before fresh weights are drawn
        student = convert_to_fixed_point(
            teacher, layer_map, initialize=convert.initialize, input_injection=convert.input_injection
        )
        return ConversionTrainer, {"model": student, "teacher": teacher}, {"initialize": convert.initialize}

    with hold_folder(args.output_dir, take=args.should_save):
        return go_on(start, text, codes, lora, args, prepare)


def choose_layers(convert: ConvertArguments, teacher, blocks, folder: Path) -> dict[str, list[int]]:
    """The layer map asked for; `"auto"` draws the similarities that it was read from."""
    names = tuple(PAPER_MAP)
    if convert.layer_map == "paper":
        return PAPER_MAP
    if convert.layer_map != "auto":
        stacks = convert.layer_map.split("/")
        if len(stacks) != 3 or not all(layer.isdecimal() for stack in stacks for layer in stack.split(",")):
            raise ValueError(
                f"`layer_map`={convert.layer_map!r} must be paper, auto, or layers like 1/6/12 or 1,2/6/12."
            )
        return {name: [int(layer) for layer in stack.split(",")] for name, stack in zip(names, stacks, strict=True)}
    sizes = {name: getattr(convert, f"num_{name}_layers") for name in names}
    ids = torch.tensor(blocks[: convert.cka_blocks]["input_ids"])
    layer_map, similarity = auto_layer_map(teacher, ids.split(8), sizes)
    folder.mkdir(parents=True, exist_ok=True)
    plot_similarity(similarity, folder / "cka.png")
    print(f"layer map by linear CKA: {layer_map} ({folder / 'cka.png'})")
    return layer_map


if __name__ == "__main__":
    main()
