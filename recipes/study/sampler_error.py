# SPDX-License-Identifier: Apache-2.0
"""The sampler's own error, apart from any model's: every rule of `generate` with a perfect denoiser.

    python recipes/study/sampler_error.py --output benchmarks/results/study_sampler_error

The truth is a small hidden Markov chain. What it says of a masked token, given the visible ones, is exact, so that
what samples are worth less than the truth's own is the sampler's doing: tokens of one step do not see each other.
There is no fixed point to find, so iterations, their allocation and reuse play no part. Writes OUTPUT.json and .md.

Shapes: N texts, L length, S hidden states, V symbols, P positions.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from fpmgm import MGMGenerationConfig
from fpmgm.command_line import parse_arguments
from fpmgm.evaluation import provenance, repetition_rate, unigram_entropy
from fpmgm.evaluation.report import table, write_report
from fpmgm.models.generation_mgm import MGMGenerationMixin
from fpmgm.models.modeling_mgm import MGMOutput


RULES = [  # beside the number of steps
    {},
    {"final": "argmax"},
    {"temperature": 0.8},
    {"top_p": 0.9},
    {"remask": 0.05},
    {"remask": 0.2},
    {"remask": 0.2, "top_p": 0.9},
    {"order": "halton"},
    {"order": "halton", "temperature": 0.8},
    {"order": "halton", "top_p": 0.9},
    {"order": "confidence"},
    {"order": "confidence", "temperature": 0.8},
    {"order": "entropy", "entropy_bound": 0.0},
    {"order": "entropy", "entropy_bound": 0.1},
    {"order": "entropy", "entropy_bound": 1.0},
    {"order": "threshold", "confidence_threshold": 0.9},
    {"order": "threshold", "confidence_threshold": 0.7},
    {"order": "margin", "margin_threshold": 0.8},
    {"order": "entropy", "entropy_bound": 0.1, "block_length": 8},
    {"block_length": 8},
    {"order": "halton", "block_length": 8},
]


@dataclass(frozen=True)
class HiddenMarkovChain:
    """`start` (S,), `moves` (S, S) and `emissions` (S, V) are probabilities, in rows."""

    start: torch.Tensor
    moves: torch.Tensor
    emissions: torch.Tensor

    @classmethod
    def random(cls, num_states: int, num_symbols: int, seed: int) -> "HiddenMarkovChain":
        """Few moves from a state are likely, and few symbols of it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            moves, emissions = (
                torch.distributions.Dirichlet(torch.full((num_states, size), concentration, dtype=torch.float64))
                .sample()
                .clamp(min=1e-6)
                for size, concentration in ((num_states, 0.1), (num_symbols, 0.1))
            )
        start = torch.full((num_states,), 1 / num_states, dtype=torch.float64)
        return cls(start, moves / moves.sum(1, keepdim=True), emissions / emissions.sum(1, keepdim=True))

    def sample(self, count: int, length: int, seed: int) -> torch.LongTensor:
        """(N, L) texts."""
        generator = torch.Generator().manual_seed(seed)
        states, columns = self.start.expand(count, -1), []
        for _ in range(length):
            state = torch.multinomial(states, 1, generator=generator).squeeze(1)
            columns.append(torch.multinomial(self.emissions[state], 1, generator=generator).squeeze(1))
            states = self.moves[state]
        return torch.stack(columns, dim=1)

    def messages(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From p(seen | state) (N, L, S): p(state | what is seen elsewhere) (N, L, S), log p of what is seen (N,)."""
        before, log_p = [self.start.expand(len(seen), -1)], 0.0
        for column in seen.unbind(dim=1):  # forward
            joint = before[-1] * column
            log_p = log_p + joint.sum(dim=1).log()
            before.append((joint / joint.sum(dim=1, keepdim=True)) @ self.moves)
        after = [torch.ones_like(before[0])]
        for column in seen.unbind(dim=1)[:0:-1]:  # backward
            message = (after[-1] * column) @ self.moves.T
            after.append(message / message.sum(dim=1, keepdim=True))
        both = torch.stack(before[:-1], dim=1) * torch.stack(after[::-1], dim=1)
        return both / both.sum(dim=2, keepdim=True), log_p

    def log_probability(self, texts: torch.LongTensor) -> torch.Tensor:
        """(N,) log p of whole texts."""
        return self.messages(self.emissions.T[texts])[1]

    def posterior(self, texts: torch.LongTensor, mask_token_id: int) -> torch.Tensor:
        """(N, L, V) p(symbol | the visible symbols elsewhere)."""
        symbols = torch.cat([self.emissions.T, torch.ones_like(self.emissions[:, :1].T)])  # a mask says nothing
        return self.messages(symbols[texts.where(texts != mask_token_id, len(symbols) - 1)])[0] @ self.emissions


class PerfectDenoiser(MGMGenerationMixin, nn.Module):
    """`generate` with the chain's posterior; one step costs one block evaluation."""

    def __init__(self, chain: HiddenMarkovChain, length: int):
        super().__init__()
        self.chain, self.device = chain, torch.device("cpu")
        symbols = chain.emissions.shape[1]
        self.config = SimpleNamespace(
            vocab_size=symbols + 1, mask_token_id=symbols, max_position_embeddings=length, num_pre_layers=1,
            num_fixed_point_layers=0, num_post_layers=0, num_classes=0, num_register_tokens=0, can_reuse=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        self.generation_config = MGMGenerationConfig()

    def forward(self, input_ids, logits_positions, **ignored) -> MGMOutput:
        """Logits (P, V + 1)."""
        found = self.chain.posterior(input_ids, self.config.mask_token_id).flatten(0, 1)[logits_positions]
        return MGMOutput(logits=nn.functional.pad(found.log(), (0, 1), value=-1e9), block_evaluations=1)


@dataclass(kw_only=True)
class SamplerErrorArguments:
    """The chain, and how much is sampled."""

    num_states: int = field(default=12, metadata={"help": "Hidden states."})
    num_symbols: int = field(default=24, metadata={"help": "Symbols."})
    length: int = field(default=32, metadata={"help": "Symbols of a text."})
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32], metadata={"help": "Denoising steps."})
    num_samples: int = field(default=2000, metadata={"help": "Texts of each rule and number of steps."})
    output: str = field(default="sampler_error", metadata={"help": "Written with .json and .md."})
    seed: int = field(default=0, metadata={"help": "Of the chain and the samples."})


def main(argv: list[str] | None = None) -> dict:
    """Sample by every rule; returns what the JSON file holds."""
    (args,) = parse_arguments((SamplerErrorArguments,), __doc__, argv)
    chain = HiddenMarkovChain.random(args.num_states, args.num_symbols, args.seed)
    texts = chain.sample(10 * args.num_samples, args.length, args.seed)
    rates = -chain.log_probability(texts) / args.length
    found = {
        "entropy_rate": rates.mean().item(),
        "entropy_rate_standard_error": rates.std().item() / math.sqrt(len(rates)),
        "unigram_entropy": unigram_entropy(texts.tolist()),
        "repetition_4": repetition_rate(texts.tolist()),
        "rows": [],
        "arguments": vars(args),
        "provenance": provenance(),
    }
    model = PerfectDenoiser(chain, args.length)
    for rule in RULES:
        for steps in args.num_steps:
            if -(-args.length // rule.get("block_length", args.length)) > steps:
                continue  # each block needs a step
            found["rows"].append({**rule, "num_steps": steps, **measure(model, rule, steps, args, rates)})
            print(json.dumps(found["rows"][-1]), flush=True)
    write_report(Path(args.output).with_suffix(".json"), found, markdown(found))
    return found


def measure(model: PerfectDenoiser, rule: dict, steps: int, args: SamplerErrorArguments, rates: torch.Tensor) -> dict:
    """Excess, entropy and repetition of samples by a rule, in as many steps."""
    out = model.generate(
        batch_size=args.num_samples, seed=args.seed, budget=steps, num_steps=steps, return_dict_in_generate=True,
        **rule,
    )  # fmt: skip
    drawn = out.sequences
    losses = -model.chain.log_probability(drawn) / args.length
    return {
        "mean_steps": out.num_steps_per_sequence.double().mean().item(),
        "tokens_per_step": out.tokens_per_step,
        "excess": losses.mean().item() - rates.mean().item(),
        "excess_standard_error": math.hypot(losses.std().item() / math.sqrt(len(losses)),
                                            rates.std().item() / math.sqrt(len(rates))),
        "unigram_entropy": unigram_entropy(drawn.tolist()),
        "repetition_4": repetition_rate(drawn.tolist()),
    }  # fmt: skip


def markdown(found: dict) -> str:
    """Excess, with the difference of the unigram entropy, by rule and number of steps."""
    args = found["arguments"]
    steps = args["num_steps"]
    lines = []
    for rule in RULES:
        rows = [row for row in found["rows"] if all(row.get(name) == rule.get(name) for name in names())]
        cells = {row["num_steps"]: cell(row, found["unigram_entropy"]) for row in rows}
        title = ", ".join(f"{name} {value}" for name, value in rule.items()) or "ancestral (the default)"
        lines.append([title, *map(cells.get, steps)])
    return (
        f"{table(['rule', *(f'{s} steps' for s in steps)], lines)}\n\n"
        "Excess in nats per symbol ± standard error; then the unigram entropy of a text less the truth's; then, "
        "where an order that adapts took fewer than allowed, the mean number of its steps. The truth "
        f"is a hidden Markov chain of {args['num_states']} states and {args['num_symbols']} symbols, texts of "
        f"{args['length']}; entropy rate {found['entropy_rate']:.4f} ± {found['entropy_rate_standard_error']:.4f}, "
        f"unigram entropy {found['unigram_entropy']:.3f}; {args['num_samples']} texts each. "
        f"`{found['provenance']['command']}`\n"
    )


def cell(row: dict, entropy: float) -> str:
    """Excess, entropy, and the steps of an order that ended early."""
    text = f"{row['excess']:+.3f} ± {row['excess_standard_error']:.3f}; {row['unigram_entropy'] - entropy:+.3f}"
    early = row["mean_steps"] < row["num_steps"] and row.get("order") in ("entropy", "threshold", "margin")
    return f"{text}; {row['mean_steps']:.1f}" if early else text


def names() -> set[str]:
    """What any rule sets."""
    return {name for rule in RULES for name in rule}


if __name__ == "__main__":
    main()
