# SPDX-License-Identifier: Apache-2.0
"""Train an MDLM or an FP-MDLM to write answers: rows of prompts and completions, or of messages.

    python recipes/train_sft.py --config recipes/configs/sft_small.yaml --text_files my_answers.jsonl
    python recipes/train_sft.py --model_name_or_path outputs/fp_mdlm_small --text_files my_answers.jsonl
        --output_dir outputs/answers --max_steps 1000 --learning_rate 5e-4 --warmup_steps 50

A line of the file is `{"prompt": ..., "completion": ...}`, or `{"messages": [...]}` for a tokenizer with a chat
template. The same command goes on from the last checkpoint in `output_dir`.
"""

from fpmgm.command_line import parse_arguments
from fpmgm.trainers import MGMTrainingConfig
from fpmgm.trainers.lock import hold_folder
from fpmgm.trainers.peft import LoraArguments
from text_data import PromptArguments, load_prompts
from train_and_export import OptionalStartArguments, check_adapter
from train_owt import ModelArguments, train


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, export; returns the metrics of the exported weights."""
    types = (OptionalStartArguments, PromptArguments, ModelArguments, LoraArguments, MGMTrainingConfig)
    start, data, model_args, lora, args = parse_arguments(types, __doc__, argv)
    check_adapter(lora, start)
    with hold_folder(args.output_dir, take=args.should_save):
        return train(model_args, start, lora, data, args, load_prompts)


if __name__ == "__main__":
    main()
