# SPDX-License-Identifier: Apache-2.0
"""Train an MDLM or an FP-MDLM on text: OpenWebText as in the paper, any hub dataset, or local files.

    accelerate launch recipes/train_owt.py --config recipes/configs/fp_mdlm_owt.yaml
    python recipes/train_owt.py --config recipes/configs/fp_mdlm_small.yaml --text_files my_text.txt
    python recipes/train_owt.py --model_name_or_path quickstart/fp_mdlm --use_peft
        --text_files my_text.txt --output_dir outputs/adapter --max_steps 500 --learning_rate 1e-3 --warmup_steps 50

The same command goes on from the last checkpoint in `output_dir`. What is exported there holds the EMA weights.
"""

from collections.abc import Callable
from dataclasses import asdict

from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.command_line import model_arguments, parse_arguments
from fpmgm.models.text_input import boundary_ids
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from fpmgm.trainers.lock import hold_folder
from fpmgm.trainers.peft import LoraArguments
from text_data import DataArguments, SourceArguments, describe_text, load_blocks, load_tokenizer
from train_and_export import (
    OptionalStartArguments,
    Rows,
    check_adapter,
    check_architecture,
    load_model,
    make_trainer,
    run_checkpoint,
    train_and_export,
)


ModelArguments = model_arguments(
    FPMDLMConfig, exclude=("vocab_size", "mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, export; returns the metrics of the exported weights."""
    types = (OptionalStartArguments, DataArguments, ModelArguments, LoraArguments, MGMTrainingConfig)
    start, data, model_args, lora, args = parse_arguments(types, __doc__, argv)
    check_adapter(lora, start)
    with hold_folder(args.output_dir, take=args.should_save):
        return train(model_args, start, lora, data, args, load_blocks)


def train(
    model_args: ModelArguments,
    start: OptionalStartArguments,
    lora: LoraArguments,
    data: SourceArguments,
    args: MGMTrainingConfig,
    load_rows: Callable,
) -> dict[str, float]:
    """[`main`], in a folder that is this run's alone, of the rows that `load_rows` makes of the data."""
    checkpoint = run_checkpoint(args)
    with args.main_process_first(desc="data"):
        tokenizer = load_tokenizer(data, start.model_name_or_path, checkpoint)
        config = load_config(model_args, start.model_name_or_path, tokenizer)
        blocks = load_rows(data, tokenizer, config.max_position_embeddings)

    set_seed(args.seed)  # before the weights are drawn
    if start.model_name_or_path is None:
        model = FPMDLMForMaskedDiffusion(config)
    else:
        model = load_model(start.model_name_or_path)
    trained_here = data.tokenizer is None and start.model_name_or_path is None
    options = {"tokenizer_vocab_size": data.tokenizer_vocab_size} if trained_here else {}
    rows = Rows(*blocks, tokenizer, data.description, describe_text(data))
    trainer = make_trainer(MGMTrainer, rows, start, lora, args, options, model=model)
    return train_and_export(trainer, checkpoint, data.words)


def load_config(architecture: ModelArguments, model_name: str | None, tokenizer: PreTrainedTokenizerBase):
    """The configuration asked for, or that of the model to go on from, which the options must not contradict."""
    if model_name is None:
        begin, end = boundary_ids(tokenizer)
        return FPMDLMConfig(
            **asdict(architecture),
            vocab_size=len(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=begin,
            eos_token_id=end,
        )
    config = AutoConfig.from_pretrained(model_name)
    check_architecture(architecture, config, model_name)
    if tokenizer.mask_token_id != config.mask_token_id or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens and mask id {tokenizer.mask_token_id}, but "
            f"`model_name_or_path`={model_name!r} was trained with {config.vocab_size} and {config.mask_token_id}: "
            "give the tokenizer it was trained with."
        )
    return config


if __name__ == "__main__":
    main()
