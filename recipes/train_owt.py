# SPDX-License-Identifier: Apache-2.0
"""Train an MDLM or an FP-MDLM on text: OpenWebText as in the paper, any hub dataset, or local files.

    accelerate launch recipes/train_owt.py --config recipes/configs/fp_mdlm_owt.yaml
    python recipes/train_owt.py --config recipes/configs/fp_mdlm_small.yaml --text_files my_text.txt

The same command goes on from the last checkpoint in `output_dir`. What is exported there holds the EMA weights.
"""

from dataclasses import asdict, dataclass, field

from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.data import add_mask_token, load_text, pack, train_tokenizer
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from fpmgm.trainers.arguments import model_arguments, parse_arguments


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
    tokenizer: str | None = field(default="gpt2", metadata={"help": "Hub name or folder; null: train one."})
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer that is trained here."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise; null: one."})


ModelArguments = model_arguments(
    FPMDLMConfig, exclude=("vocab_size", "mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, export; returns the metrics of the exported weights."""
    model_args, data, args = parse_arguments((ModelArguments, DataArguments, MGMTrainingConfig), __doc__, argv)

    with args.main_process_first(desc="data"):
        tokenizer = load_tokenizer(data)
        train_blocks, eval_blocks = load_blocks(data, tokenizer, model_args.max_position_embeddings)

    config = FPMDLMConfig(
        **asdict(model_args),
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(args.seed)  # before the weights are drawn
    model = FPMDLMForMaskedDiffusion(config)
    if args.data_description is None:
        args.data_description = data.dataset_name or f"{len(data.text_files)} local file(s)"

    trainer = MGMTrainer(
        model=model, args=args, train_dataset=train_blocks, eval_dataset=eval_blocks, processing_class=tokenizer
    )
    last = args.resume_from_checkpoint or get_last_checkpoint(args.output_dir)
    trainer.save_metrics("train", trainer.train(resume_from_checkpoint=last).metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model()  # and pushes, with --push_to_hub
    return metrics


def load_tokenizer(data: DataArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named, or one trained on the training text; with a mask token."""
    if data.tokenizer is not None:
        return add_mask_token(AutoTokenizer.from_pretrained(data.tokenizer))
    text = load_text(data.text_files, data.dataset_name, data.dataset_config, data.train_split, data.text_column)
    return train_tokenizer(text["text"], data.tokenizer_vocab_size)


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
