# SPDX-License-Identifier: Apache-2.0
"""How long scoring a request takes: a plain procedure against this library's lm-eval model, in one run.

    python benchmarks/lm_eval_throughput.py
    python benchmarks/lm_eval_throughput.py --device cuda --mc_num 1024 --requests 64

*plain* does what the protocols' published scripts do: one request at a time, its draws in batches, logits and
log-probabilities of the whole vocabulary at every position of every draw. *ours* is `MGMLM.loglikelihood`. Both get
the same draws, and their scores must agree. Both check greediness where the published script does so by default; for
smdm, where it does not, only ours does.

The two take turns; a protocol's ratio is the median over the turns of plain seconds / our seconds. On a CPU the
seconds are those that it worked for this process, so that others' work on a shared machine does not count.
"""

import os
import statistics
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from fpmgm.command_line import parse_arguments
from fpmgm.evaluation import provenance
from fpmgm.evaluation.lm_eval import MGMLM, PROTOCOLS
from fpmgm.evaluation.lm_eval.protocols import Draws, thinned
from fpmgm.evaluation.report import table, write_report
from fpmgm.models.noise import stream_generator
from sampling_speed import ARCHITECTURES, now, random_model, sizes_of


EOS = 0


@dataclass
class Arguments:
    """What is measured."""

    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where to run."})
    architecture: str = field(default="fp", metadata={"help": "Of the model.", "choices": list(ARCHITECTURES)})
    protocols: list[str] = field(
        default_factory=lambda: list(PROTOCOLS), metadata={"help": "Which to measure.", "choices": list(PROTOCOLS)}
    )
    mc_num: int = field(default=128, metadata={"help": "Draws per request; 0: each protocol's own."})
    requests: int = field(default=1, metadata={"help": "Requests scored."})
    prefix: int = field(default=9, metadata={"help": "Tokens of a prompt (OpenBookQA's median with GPT-2)."})
    target: int = field(default=3, metadata={"help": "Tokens of an answer (the same)."})
    batch_size: int = field(default=32, metadata={"help": "Copies per call of the model."})
    repetitions: int = field(default=2, metadata={"help": "Turns of both."})
    hidden_size: int = field(default=768, metadata={"help": "Width; 768 is MDLM-small."})
    vocab_size: int = field(default=50258, metadata={"help": "Tokens of the vocabulary."})
    tolerance: float = field(default=1e-4, metadata={"help": "Largest relative difference of the scores."})
    output: str = field(default="benchmarks/results/lm_eval_throughput_cpu.json", metadata={"help": "JSON to write."})


def number_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` ids: the end of text, then the words "1", "2", …"""
    words = {"<eos>": EOS, **{str(i): i for i in range(1, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@torch.no_grad()
def log_probabilities(model, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, L, V) at every position."""
    logits = model(input_ids).logits
    logits[..., model.config.mask_token_id] = float("-inf")
    return logits.log_softmax(dim=-1)


class Drawn(NamedTuple):
    """A request with its draws; of its tokens, `start` … `stop` − 1 are the target, `first` … `last` − 1 maskable."""

    ids: list[int]
    start: int
    stop: int
    first: int
    last: int
    draws: Draws


def draw(protocol: str, prefix: list[int], target: list[int], mc_num: int) -> Drawn:
    """The draws that ours makes too."""
    rule = PROTOCOLS[protocol]
    ids = [EOS, *prefix, *target, EOS] if rule.joint else prefix + target
    start = len(prefix) + rule.joint
    stop = start + len(target)
    first, last = (0, len(ids)) if rule.joint else (start, stop)
    noise = stream_generator(0, protocol, tuple(ids), start, stop)
    return Drawn(ids, start, stop, first, last, rule.draws(last - first, mc_num, noise))


def plain(model, protocol: str, prefix: list[int], target: list[int], mc_num: int, batch_size: int) -> float:
    """The score of one request as the published scripts compute it."""
    request = draw(protocol, prefix, target, mc_num)
    masked = torch.zeros(mc_num, len(request.ids), dtype=torch.bool)
    masked[:, request.first : request.last] = request.draws.masked
    masked, weights = masked.to(model.device), request.draws.weights.to(model.device)
    ids, total = torch.tensor(request.ids, device=model.device), 0.0
    for some, weight in zip(masked.split(batch_size), weights.split(batch_size), strict=True):
        labels = ids.expand(len(some), -1)
        noisy = labels.masked_fill(some, model.config.mask_token_id)
        found = log_probabilities(model, noisy).gather(2, labels[..., None])[..., 0]
        total += (weight[:, None] * torch.where(some, found, 0.0)).sum().item()
    if protocol != "smdm":
        greedy(model, ids, request.start, request.stop, PROTOCOLS[protocol].greedy_at_once)
    return total / mc_num / (len(ids) if PROTOCOLS[protocol].joint else 1)


def greedy(model, ids: torch.Tensor, start: int, stop: int, at_once: bool) -> bool:
    """Whether decoding writes the target, one request in a batch."""
    written, mask = ids.clone(), model.config.mask_token_id
    written[start:stop] = mask
    while (written == mask).any():
        confidence, likely = log_probabilities(model, written[None])[0].max(dim=-1)
        places = (written == mask).nonzero()[:, 0]
        places = places if at_once else places[confidence[places].argmax()]
        written[places] = likely[places]
    return torch.equal(written, ids)


def copies(protocol: str, pairs: list, mc_num: int) -> int:
    """Masked copies that ours runs for the draws of all requests."""
    return sum(len(thinned(draw(protocol, *pair, mc_num).draws).masked) for pair in pairs)


def measure(args: Arguments, model, protocol: str) -> dict:
    """Seconds of both for the same requests, taking turns."""
    mc_num = args.mc_num or PROTOCOLS[protocol].mc_num
    vocabulary = model.config.mask_token_id
    words = torch.randint(1, vocabulary, (args.requests, args.prefix + args.target), generator=stream_generator(0))
    pairs = [(row[: args.prefix], row[args.prefix :]) for row in words.tolist()]
    texts = [(" ".join(map(str, prefix)), " " + " ".join(map(str, target))) for prefix, target in pairs]
    requests = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    lm = MGMLM(
        model,
        tokenizer=number_tokenizer(vocabulary),
        protocol=protocol,
        mc_num=mc_num,
        batch_size=args.batch_size,
        device=args.device,
    )
    seconds_now = partial(now, args.device, "process" if args.device == "cpu" else "wall")
    seconds = {"plain": [], "ours": []}
    for _ in range(args.repetitions):
        begin = seconds_now()
        expected = [plain(model, protocol, *pair, mc_num, args.batch_size) for pair in pairs]
        between = seconds_now()
        found = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        seconds["plain"].append(between - begin)
        seconds["ours"].append(seconds_now() - between)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=args.tolerance, atol=0)
    return {
        "protocol": protocol,
        "mc_num": mc_num,
        "draws": mc_num * len(pairs),
        "copies_of_ours": copies(protocol, pairs, mc_num),
        "own_mc_num": PROTOCOLS[protocol].mc_num,
        "copies_of_ours_with_own_mc_num": copies(protocol, pairs, PROTOCOLS[protocol].mc_num),
        "seconds": seconds,
        "ratio": statistics.median(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True)),
        "largest_relative_difference": max(abs(f / e - 1) for f, e in zip(found, expected, strict=True)),
    }


def markdown(result: dict) -> str:
    """The ratios as a table."""
    columns = ["protocol", "draws", "masked copies run, ours / plain", "plain s", "ours s", "plain / ours"]
    columns.append("copies with the protocol's own draws")
    a, p = result["arguments"], result["provenance"]
    rows = [
        [row["protocol"], row["mc_num"], f"{row['copies_of_ours']} / {row['draws']}",
         *(f"{statistics.median(row['seconds'][name]):.1f}" for name in ("plain", "ours")), f"{row['ratio']:.1f}",
         f"{row['copies_of_ours_with_own_mc_num']} / {row['own_mc_num'] * a['requests']}"]
        for row in result["rows"]
    ]  # fmt: skip
    return (
        f"{table(columns, rows)}\n\n"
        f"{a['requests']} request(s) of {a['prefix']} + {a['target']} tokens, {a['architecture']} at width "
        f"{a['hidden_size']}, vocabulary {a['vocab_size']:,}, random weights, batches of {a['batch_size']}; "
        f"{p['device']}; torch {p['versions']['torch']}, commit {p['commit']}. "
        f"Medians of {a['repetitions']} turns, the ratio that of the turns' ratios; on a CPU its own time."
    )


def main() -> None:
    """Measure and write JSON and a table."""
    (args,) = parse_arguments((Arguments,), __doc__)
    sizes = sizes_of(args.hidden_size, args.prefix + args.target + 2, args.vocab_size)
    model = random_model(**sizes, **ARCHITECTURES[args.architecture]).to(args.device)
    result = {
        "provenance": {**provenance(args.device), "load_average": os.getloadavg()},
        "arguments": asdict(args),
        "rows": [measure(args, model, protocol) for protocol in tqdm(args.protocols)],
    }
    write_report(args.output, result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
