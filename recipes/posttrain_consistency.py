# SPDX-License-Identifier: Apache-2.0
"""Post-train a model with cross-step consistency, fixed-point (CoFRe) or explicit.

    accelerate launch recipes/posttrain_consistency.py --config recipes/configs/consistency_owt.yaml
    python recipes/posttrain_consistency.py --config recipes/configs/consistency_small.yaml \\
        --model_name_or_path outputs/fp_mdlm_small --text_files my_text.txt

It ends at the first evaluation whose perplexity exceeds that before by 15 %, and exports that model's average.
"""

from fpmgm.trainers import ConsistencyConfig, ConsistencyTrainer
from train_and_export import post_train


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, export; returns the metrics before and after."""
    return post_train(ConsistencyTrainer, ConsistencyConfig, __doc__, argv)


if __name__ == "__main__":
    main()
