# SPDX-License-Identifier: Apache-2.0
"""Distil a model into fewer steps by self-distillation through time; explicit or fixed-point.

    accelerate launch recipes/distill_sdtt.py --config recipes/configs/sdtt_owt.yaml
    python recipes/distill_sdtt.py --config recipes/configs/sdtt_small.yaml \\
        --model_name_or_path outputs/mdlm_small --text_files my_text.txt
"""

from fpmgm.trainers import SDTTConfig, SDTTTrainer
from train_and_export import post_train


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, export; returns the metrics before and after."""
    return post_train(SDTTTrainer, SDTTConfig, __doc__, argv)


if __name__ == "__main__":
    main()
