# SPDX-License-Identifier: Apache-2.0
"""Sample a world whose truth is known: texts of a causal language model at temperature 1, as blocks of token ids.

    python recipes/sample_world.py --truth stories260K --num_texts 80000 --length 128 --output_dir worlds/stories
    python recipes/sample_world.py --truth stories260K --num_texts 2000 --seed 1 --output_dir worlds/held_out

A text is what follows the model's start token, which is not stored: all of a text's tokens are drawn, and all are to
be generated. Text k depends on `seed` and k only. The same command goes on where it was interrupted; a larger
`num_texts` adds texts. Writes shards of `input_ids` and of each text's −log p in nats, and world.json, which says
the truth's entropy rate as these texts estimate it.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from fpmgm.command_line import ModelName, parse_arguments
from fpmgm.evaluation.provenance import provenance
from fpmgm.evaluation.store import fingerprint
from fpmgm.evaluation.truth import check_truth, sample_texts


@dataclass(kw_only=True)
class WorldArguments:
    """What to sample and where to."""

    truth: ModelName = field(metadata={"help": "Causal language model: folder or hub name."})
    num_texts: int = field(default=80_000, metadata={"help": "Texts."})
    length: int = field(default=128, metadata={"help": "Tokens of a text, without the start token."})
    output_dir: str = field(default="world", metadata={"help": "Where the shards are written."})
    seed: int = field(default=0, metadata={"help": "Another one gives other texts: use it for held-out ones."})
    texts_per_shard: int = field(default=500, metadata={"help": "Texts of a file, drawn together."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})


class World(Dataset):
    """Rows with `input_ids` (L,) of a sampled world; `surprise` (N,) is −log p of each text under the truth, in nats.

    Args:
        folder (`str` or `Path`): What `sample_world.py` wrote.
        num_texts (`int`, *optional*): The first this many. `None`: all.
        skip (`int`, defaults to 0): Texts left out before them.
    """

    def __init__(self, folder: str | Path, num_texts: int | None = None, skip: int = 0):
        shards = [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
        found = sum(len(shard["input_ids"]) for shard in shards)
        wanted = found - skip if num_texts is None else num_texts
        if not 1 <= wanted <= found - skip:
            raise ValueError(f"`folder`={str(folder)!r} holds {found} texts, not {skip} + {wanted}: sample more.")
        part = slice(skip, skip + wanted)
        self.input_ids = torch.cat([shard["input_ids"] for shard in shards])[part]
        self.surprise = torch.cat([shard["surprise"] for shard in shards])[part]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index].long()}


def main(argv: list[str] | None = None) -> dict:
    """Sample what is missing; returns what world.json holds."""
    (args,) = parse_arguments((WorldArguments,), __doc__, argv)
    truth = AutoModelForCausalLM.from_pretrained(args.truth).to(args.device).eval()
    check_truth(truth, args.length)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_world(folder, args, fingerprint(truth))
    with_mask_token(AutoTokenizer.from_pretrained(args.truth)).save_pretrained(folder)
    starts = range(0, args.num_texts, args.texts_per_shard)
    for start in logging.tqdm(starts, desc="sampling", unit_scale=args.texts_per_shard, unit="text"):
        rows = range(start, min(start + args.texts_per_shard, args.num_texts))
        sample_shard(folder / f"texts-{start:09d}.safetensors", truth, rows, args)
    return describe(folder, args, fingerprint(truth))


def with_mask_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The truth's tokenizer with a mask behind its ids, as masked models of this world need it."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return tokenizer


def sample_shard(path: Path, truth, rows: range, args: WorldArguments) -> None:
    """Write the texts `rows` unless the file holds as many."""
    if path.exists() and len(load_file(path)["input_ids"]) >= len(rows):
        return
    input_ids, surprise = sample_texts(truth, [(args.seed, row) for row in rows], args.length)
    unfinished = path.with_suffix(".part")
    save_file({"input_ids": input_ids.int().cpu(), "surprise": surprise.cpu()}, unfinished)
    unfinished.rename(path)


def check_same_world(folder: Path, args: WorldArguments, weights: str) -> None:
    """Raise a `ValueError` if the folder holds another world; say which one it is to hold otherwise."""
    path = folder / "world.json"
    asked = {name: getattr(args, name) for name in ("length", "seed", "texts_per_shard")} | {"truth_weights": weights}
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        wrong = {name: held[name] for name, value in asked.items() if held[name] != value}
        if wrong:
            raise ValueError(f"`output_dir`={args.output_dir!r} holds a world of {wrong}: give another folder.")
    else:
        path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def describe(folder: Path, args: WorldArguments, weights: str) -> dict:
    """Write world.json."""
    world = World(folder)
    rates = world.surprise / args.length
    found = {
        "truth": Path(args.truth).name,
        "truth_weights": weights,
        "length": args.length,
        "seed": args.seed,
        "texts_per_shard": args.texts_per_shard,
        "num_texts": len(world),
        "num_tokens": len(world) * args.length,
        "entropy_rate": rates.mean().item(),
        "entropy_rate_standard_error": rates.std().item() / math.sqrt(len(rates)),
        "provenance": provenance(args.device),
    }
    (folder / "world.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        f"{found['num_tokens']:,} tokens in {folder}; entropy rate {found['entropy_rate']:.4f} ± "
        f"{found['entropy_rate_standard_error']:.4f} nats"
    )
    return found


if __name__ == "__main__":
    main()
