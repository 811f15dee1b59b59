# SPDX-License-Identifier: Apache-2.0
"""How often rounding of float32 logits flips a draw: inverse CDF from one uniform against Gumbel-max from V.

    python benchmarks/draw_flips.py

The same random numbers draw from float64 logits and from the same logits with float32 rounding noise of the size that
another batch shape causes (measured on a product of the head's size). Both draws run in float64.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from fpmgm.evaluation import provenance
from fpmgm.models.sampling import draw_tokens


def rounding_noise(hidden_size: int, vocab_size: int) -> float:
    """Standard deviation of the difference of a head's float32 logits between batch shapes, for unit logits."""
    torch.manual_seed(0)
    h, weight = torch.randn(64, hidden_size), torch.randn(vocab_size, hidden_size) / hidden_size**0.5
    whole = h @ weight.T
    single = torch.cat([row[None] @ weight.T for row in h])
    return float((whole - single).std())


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=50258)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--positions", type=int, default=20000)
    parser.add_argument("--output", default="benchmarks/results/draw_flips.json")
    args = parser.parse_args()
    noise = rounding_noise(args.hidden_size, args.vocab_size)
    result = {"provenance": provenance(), "arguments": vars(args), "rounding_std": noise}
    rows = []
    for scale in (1.0, 3.0):  # near-uniform and peaked predictions
        flips, seconds = {"inverse CDF": 0, "Gumbel-max": 0}, {"inverse CDF": 0.0, "Gumbel-max": 0.0}
        for _ in range(0, args.positions, 100):
            exact = scale * torch.randn(100, args.vocab_size, dtype=torch.float64)
            rounded = exact + scale * noise * torch.randn_like(exact)
            uniforms = torch.rand(100, dtype=torch.float64)
            start = time.perf_counter()
            a, b = (draw_tokens(x, uniforms, args.vocab_size - 1)[0] for x in (exact, rounded))
            seconds["inverse CDF"] += time.perf_counter() - start
            flips["inverse CDF"] += int((a != b).sum())
            start = time.perf_counter()
            noise_values = torch.rand_like(exact)
            gumbel = -(-(noise_values.clamp(min=1e-300)).log()).log()
            a, b = ((x.log_softmax(dim=-1) + gumbel).argmax(dim=-1) for x in (exact, rounded))
            seconds["Gumbel-max"] += time.perf_counter() - start
            flips["Gumbel-max"] += int((a != b).sum())
        rows += [
            {"logit_std": scale, "draw": d, "flipped": flips[d] / args.positions, "seconds": round(seconds[d], 2)}
            for d in flips
        ]
    result["rows"] = rows
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
