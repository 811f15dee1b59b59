# SPDX-License-Identifier: Apache-2.0
"""Options that make a training recipe's model small, its run short and its process quiet."""

from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--hidden_size", "16", "--num_attention_heads", "2", "--intermediate_size", "32", "--conditioning_size", "8"]
SMALL += ["--eval_num_draws", "1"]
SHORT = ["--warmup_steps", "0", "--eval_steps", "1", "--save_steps", "1", "--per_device_train_batch_size", "4"]
SHORT += ["--eval_num_draws", "1"]
QUIET = ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none"]


def configured(name: str) -> list[str]:
    """A recipe's YAML."""
    return ["--config", str(RECIPES / f"configs/{name}.yaml")]
