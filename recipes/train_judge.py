# SPDX-License-Identifier: Apache-2.0
"""Train a small autoregressive judge on the texts of a world, so that samples can be scored without a download.

    python recipes/train_judge.py --world studies/small/world --held_out studies/small/held_out --output_dir judge
    python recipes/budget_report.py --model outputs/cofre --judge judge --max_length 128

A Llama in the world's own tokens. Writes the model, its tokenizer and eval_results.json; `eval_excess` there is what
it lacks of the truth, in nats per token.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from fpmgm.command_line import LocalPath, parse_arguments
from sample_world import World


@dataclass(kw_only=True)
class JudgeArguments:
    """The texts and the size of the judge."""

    world: LocalPath = field(metadata={"help": "Texts to train on: what sample_world.py wrote."})
    held_out: LocalPath = field(metadata={"help": "Texts to evaluate on, of another seed."})
    hidden_size: int = field(default=96, metadata={"help": "Width."})
    num_layers: int = field(default=5, metadata={"help": "Blocks."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads."})


@dataclass
class JudgeTrainingArguments(TrainingArguments):
    """Defaults for minutes on one core; all of `TrainingArguments` may be given."""

    output_dir: str = field(default="judge", metadata={"help": "Where the judge is written."})
    max_steps: int = field(default=3000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps of warm-up."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts per device and step."})
    per_device_eval_batch_size: int = field(default=100, metadata={"help": "Texts per device of an evaluation."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept."})
    report_to: str | None = field(default="none", metadata={"help": "Where to log."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save; returns what was measured."""
    args, training = parse_arguments((JudgeArguments, JudgeTrainingArguments), __doc__, argv)
    check_worlds(args)
    texts, held_out = World(args.world), World(args.held_out)
    tokenizer, length = AutoTokenizer.from_pretrained(args.world), texts.input_ids.shape[1]
    set_seed(training.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_attention_heads,
            max_position_embeddings=length + 1,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=texts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=Batches(tokenizer.bos_token_id),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    found = trainer.evaluate()
    found["eval_perplexity"] = math.exp(found["eval_loss"])
    found["eval_excess"] = found["eval_loss"] - held_out.surprise.mean().item() / length
    trainer.save_metrics("eval", found, combined=False)
    trainer.save_model()
    print(f"perplexity {found['eval_perplexity']:.3f}, {found['eval_excess']:.3f} nats per token above the truth")
    return found


def check_worlds(args: JudgeArguments) -> None:
    """Raise a `ValueError` unless both worlds are texts of one truth and length, by two seeds."""
    folders = (args.world, args.held_out)
    world, held_out = (json.loads((Path(each) / "world.json").read_text(encoding="utf-8")) for each in folders)
    same = ("truth_weights", "length")
    wrong = {name: (world[name], held_out[name]) for name in same if world[name] != held_out[name]}
    if wrong:
        raise ValueError(f"`world` and `held_out` are no texts of one truth and length: {wrong}. Sample both of one.")
    if world["seed"] == held_out["seed"]:
        raise ValueError(
            f"`held_out`={args.held_out!r} has the `seed`={held_out['seed']} of `world`, whose texts it repeats: "
            "sample it with another seed."
        )


class Batches:
    """Batches of texts behind the start token, which are their own labels: the model shifts them."""

    def __init__(self, start_token_id: int):
        self.start_token_id = start_token_id

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        input_ids = F.pad(
            torch.stack([row["input_ids"] for row in rows]), (1, 0), value=self.start_token_id
        )  # (B, 1 + L)
        return {"input_ids": input_ids, "labels": input_ids}


if __name__ == "__main__":
    main()
