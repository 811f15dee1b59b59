# SPDX-License-Identifier: Apache-2.0
"""Write text with a trained model, from nothing or into the blanks of a prompt.

python recipes/sample.py --model org/cofre-owt --budget 96 --num_samples 4
python recipes/sample.py --model quickstart/fp_mdlm --prompt "The function returns <|mask|*20> of the list."
python recipes/sample.py --model quickstart/fp_mdlm --prompt "The function" --max_new_tokens 20 --order threshold
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import ModelName, parse_arguments
from fpmgm.models.end_of_text import known_ends
from fpmgm.models.prompt import encode_prompt
from fpmgm.models.text_input import boundary_ids, read_tokenizer


@dataclass
class SampleArguments:
    """What to write; an option left out takes the model's own default (generation_config.json)."""

    model: ModelName = field(metadata={"help": "Folder or hub name."})
    prompt: str | None = field(default=None, metadata={"help": "Text with <|mask|> or <|mask|*N> where to write."})
    num_samples: int = field(default=1, metadata={"help": "Texts to write."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Write behind the prompt, which has no blanks."}
    )
    length: int | None = field(default=None, metadata={"help": "Tokens of a text; null: the model's longest."})
    budget: int | None = field(default=None, metadata={"help": "Block evaluations per text."})
    num_steps: int | None = field(default=None, metadata={"help": "Denoising steps; null: from the budget."})
    allocation: str | None = field(default=None, metadata={"help": "fixed, decreasing, increasing, cosine, ..."})
    reuse: str | None = field(default=None, metadata={"help": "none, full or 3sr."})
    temperature: float | None = field(default=None, metadata={"help": "0: most likely tokens."})
    top_k: int | None = field(default=None, metadata={"help": "Draw among the k most likely tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Draw among tokens that hold this probability."})
    order: str | None = field(
        default=None, metadata={"help": "ancestral, halton, confidence, entropy, threshold, margin."}
    )
    entropy_bound: float | None = field(default=None, metadata={"help": "Of the entropy order, in nats."})
    confidence_threshold: float | None = field(default=None, metadata={"help": "Of the threshold order."})
    margin_threshold: float | None = field(default=None, metadata={"help": "Of the margin order."})
    block_length: int | None = field(default=None, metadata={"help": "Write in blocks of so many tokens."})
    stop_at_eos: bool | None = field(default=None, metadata={"help": "End each text where it says so."})
    seed: int = field(default=0, metadata={"help": "Text k uses the stream (seed, k)."})
    output: str | None = field(default=None, metadata={"help": "A .jsonl to write to; null: the terminal."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})


def main(argv: list[str] | None = None) -> list[str]:
    """Write texts and show or save them."""
    (args,) = parse_arguments((SampleArguments,), __doc__, argv)
    tokenizer = read_tokenizer(args.model)
    model = AutoModel.from_pretrained(args.model).to(args.device)
    own = ("model", "prompt", "num_samples", "length", "seed", "output", "device")
    options = {name: x for name, x in vars(args).items() if name not in own and x is not None}
    if options.get("stop_at_eos") and not known_ends(model.generation_config, model.config):
        options["eos_token_id"] = boundary_ids(tokenizer)[1]
    prompt = None
    if args.prompt is not None:
        continued = args.max_new_tokens is not None
        prompt = encode_prompt(tokenizer, args.prompt, model.config.mask_token_id, continued)
    out = model.generate(
        input_ids=prompt,
        batch_size=args.num_samples,
        length=args.length,
        seed=args.seed,
        progress_bar=True,
        return_dict_in_generate=True,
        **options,
    )
    texts = tokenizer.batch_decode(out.sequences)
    if args.output is not None:
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        Path(args.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        for text in texts:
            print(f"\n{text}")
    print(
        f"\n{len(texts)} text(s), {out.num_steps} steps of {out.tokens_per_step:.1f} tokens, "
        f"{out.block_evaluations} block evaluations each"
    )
    return texts


if __name__ == "__main__":
    main()
