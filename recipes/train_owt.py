# SPDX-License-Identifier: Apache-2.0
"""Train an MDLM or an FP-MDLM on text: OpenWebText as in the paper, any hub dataset, or local files.

    accelerate launch recipes/train_owt.py --config recipes/configs/fp_mdlm_owt.yaml
    python recipes/train_owt.py --config recipes/configs/fp_mdlm_small.yaml --text_files my_text.txt
    python recipes/train_owt.py --model_name_or_path quickstart/fp_mdlm --tokenizer quickstart/fp_mdlm --use_peft
        --text_files my_text.txt --output_dir outputs/adapter --max_steps 500 --learning_rate 1e-3 --warmup_steps 50

The same command goes on from the last checkpoint in `output_dir`. What is exported there holds the EMA weights.
"""

from dataclasses import asdict, dataclass, field

from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.data import add_mask_token, load_text, pack, train_tokenizer
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from fpmgm.trainers.arguments import LoraArguments, model_arguments, parse_arguments
from fpmgm.trainers.peft import lora_config


@dataclass
class StartArguments:
    """What training starts from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name of a model to go on from; null: fresh weights."}
    )


@dataclass
class DataArguments:
    """Where the text comes from and how it is cut into blocks."""

    text_files: list[str] | None = field(default=None, metadata={"help": "Local .txt, .jsonl, .parquet files."})
    eval_text_files: list[str] | None = field(default=None, metadata={"help": "Local files to validate on."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, instead of local files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the hub dataset, e.g. train[:-100000]."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of the hub dataset to validate on."})
    eval_share: float = field(
        default=0.01, metadata={"help": "Share of the training blocks, the last ones, to validate on without a split."}
    )
    eval_blocks: int | None = field(default=None, metadata={"help": "Most blocks to validate on; null: all."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    streaming: bool = field(default=False, metadata={"help": "Read the training text while training."})
    tokenizer: str | None = field(
        default="gpt2", metadata={"help": "Hub name or folder; null: that of the model to go on from, or train one."}
    )
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer that is trained here."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise; null: one."})


ModelArguments = model_arguments(
    FPMDLMConfig, exclude=("vocab_size", "mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, export; returns the metrics of the exported weights."""
    types = (ModelArguments, StartArguments, LoraArguments, DataArguments, MGMTrainingConfig)
    model_args, start, lora, data, args = parse_arguments(types, __doc__, argv)
    if lora.use_peft and start.model_name_or_path is None:
        raise ValueError("`use_peft` adapts a trained model: give `model_name_or_path`.")

    with args.main_process_first(desc="data"):
        tokenizer = load_tokenizer(data, start.model_name_or_path)
        config = load_config(model_args, start.model_name_or_path, tokenizer)
        train_blocks, eval_blocks = load_blocks(data, tokenizer, config.max_position_embeddings)

    set_seed(args.seed)  # before the weights are drawn
    if start.model_name_or_path is None:
        model = FPMDLMForMaskedDiffusion(config)
    else:
        model = AutoModel.from_pretrained(start.model_name_or_path)
    if args.data_description is None:
        args.data_description = data.dataset_name or f"{len(data.text_files)} local file(s)"

    trainer = MGMTrainer(
        model=model,
        args=args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        peft_config=lora_config(lora),
    )
    last = args.resume_from_checkpoint or get_last_checkpoint(args.output_dir)
    trainer.save_metrics("train", trainer.train(resume_from_checkpoint=last).metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model()  # and pushes, with --push_to_hub
    return metrics


def load_tokenizer(data: DataArguments, model_name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer named, the model's, or one trained on the training text; with a mask token."""
    name = data.tokenizer or model_name
    if name is not None:
        return add_mask_token(AutoTokenizer.from_pretrained(name))
    text = load_text(data.text_files, data.dataset_name, data.dataset_config, data.train_split, data.text_column)
    return train_tokenizer(text["text"], data.tokenizer_vocab_size)


def load_config(architecture: ModelArguments, model_name: str | None, tokenizer: PreTrainedTokenizerBase):
    """The configuration asked for, or that of the model to go on from, which the options must not contradict."""
    if model_name is None:
        return FPMDLMConfig(
            **asdict(architecture),
            vocab_size=len(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    config, default = AutoConfig.from_pretrained(model_name), ModelArguments()
    asked = {name: value for name, value in asdict(architecture).items() if value != getattr(default, name)}
    wrong = {name: value for name, value in asked.items() if value != getattr(config, name)}
    if wrong:
        raise ValueError(f"{wrong} is not what `model_name_or_path`={model_name!r} has: leave it out.")
    if tokenizer.mask_token_id != config.mask_token_id or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens and mask id {tokenizer.mask_token_id}, but "
            f"`model_name_or_path`={model_name!r} was trained with {config.vocab_size} and {config.mask_token_id}: "
            "give the tokenizer it was trained with."
        )
    return config


def load_blocks(data: DataArguments, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple:
    """Blocks to train and to validate on."""
    source = (data.dataset_name, data.dataset_config)
    text = load_text(data.text_files, *source, data.train_split, data.text_column, data.streaming)
    train_blocks = pack(text, tokenizer, length, data.num_proc)
    if data.eval_text_files is not None or data.eval_split is not None:
        files = data.eval_text_files
        eval_source = (None, None) if files is not None else source
        eval_text = load_text(files, *eval_source, data.eval_split or "train", data.text_column)
        eval_blocks = pack(eval_text, tokenizer, length, data.num_proc)
    elif data.streaming:
        raise ValueError("`streaming`=True needs `eval_split` or `eval_text_files`: a stream has no last blocks.")
    else:
        held_out = max(1, round(data.eval_share * len(train_blocks)))
        if held_out >= len(train_blocks):
            raise ValueError(f"the text gives {len(train_blocks)} block(s), too few to hold some out: give more text.")
        eval_blocks = train_blocks.select(range(len(train_blocks) - held_out, len(train_blocks)))
        train_blocks = train_blocks.select(range(len(train_blocks) - held_out))
    if data.eval_blocks is not None:
        eval_blocks = eval_blocks.select(range(min(data.eval_blocks, len(eval_blocks))))
    return train_blocks, eval_blocks


if __name__ == "__main__":
    main()
