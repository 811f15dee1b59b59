# SPDX-License-Identifier: Apache-2.0
"""Estimated and measured: peak memory of a training step on a CPU, each in a process of its own.

    python benchmarks/cost_estimates.py

A process makes a model, AdamW, an average of the weights and two whole steps. Its peak is the most memory that it ever
held (Linux), above what it held before the model was made. The estimate is that of `fpmgm.analysis`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tqdm.auto import tqdm

from fpmgm import FPMDLMConfig
from fpmgm.analysis.memory import training_memory
from provenance import machine


ARCHITECTURES = {
    "MDLM 12/0/0": {"num_pre_layers": 12, "num_fixed_point_layers": 0, "num_post_layers": 0},
    "FP-MDLM 1/1/1": {"num_pre_layers": 1, "num_fixed_point_layers": 1, "num_post_layers": 1},
}

PEAK_SCRIPT = """
import json, re, sys
import torch
from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
options = json.loads(sys.argv[1])
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.randn(64, 64) @ torch.randn(64, 64)  # loads what products need
before = memory("VmRSS")
model = FPMDLMForMaskedDiffusion(FPMDLMConfig(**options["config"])).train()
if options["checkpointing"]:
    model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
average = [p.detach().clone() for p in model.parameters()]
size, length, mask = options["batch_size"], model.config.max_position_embeddings, model.config.mask_token_id
masked = torch.arange(size * length).view(size, length) % 2 == 0
iterations = {} if model.fixed_point is None else {"num_no_grad_iterations": 2, "num_iterations": 6}
for seed in range(2):
    input_ids = torch.randint(mask, (size, length))
    with torch.autocast("cpu", torch.bfloat16, enabled=options["dtype"] == "bfloat16"):
        loss = model(
            input_ids.masked_fill(masked, mask), labels=input_ids.masked_fill(~masked, -100),
            logits_positions=masked.flatten().nonzero().squeeze(1), **iterations,
        ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1e-4)
    del loss
print((memory("VmHWM") - before) * 1024)
"""


def compare(args: argparse.Namespace) -> list[dict]:
    """Both peaks of every setting."""
    rows = []
    settings = [
        (name, checkpointing, dtype)
        for name in ARCHITECTURES
        for checkpointing in (False, True)
        for dtype in args.dtypes
    ]
    for name, checkpointing, dtype in tqdm(settings):
        config = {
            **ARCHITECTURES[name],
            "hidden_size": args.hidden_size,
            "intermediate_size": 4 * args.hidden_size,
            "num_attention_heads": max(1, args.hidden_size // 64),
            "max_position_embeddings": args.length,
            "vocab_size": args.vocab_size,
            "mask_token_id": args.vocab_size - 1,
        }
        options = {"config": config, "batch_size": args.batch_size, "checkpointing": checkpointing, "dtype": dtype}
        command = [sys.executable, "-c", PEAK_SCRIPT, json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        estimated = training_memory(
            FPMDLMConfig(**config), args.batch_size, args.length,
            positions=args.batch_size * args.length / 2, queries=args.length / 2,
            checkpointing=checkpointing, dtype=dtype, device="cpu",
        )["peak"]  # fmt: skip
        measured = int(done.stdout.split()[-1])
        rows.append({
            "model": name, "checkpointing": checkpointing, "dtype": dtype,
            "estimated_mib": round(estimated / 2**20), "measured_mib": round(measured / 2**20),
            "ratio": round(estimated / measured, 3),
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=768, help="768 is MDLM-small.")
    parser.add_argument("--vocab_size", type=int, default=50258)
    parser.add_argument("--length", type=int, default=256, help="Tokens of a sequence.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--output", default="benchmarks/results/cost_estimates_cpu.json")
    args = parser.parse_args()
    rows = compare(args)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    result = {"machine": machine(), "arguments": vars(args), "rows": rows}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    Path(args.output).with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
