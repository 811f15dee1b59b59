# SPDX-License-Identifier: Apache-2.0
"""Find the steps, allocation, reuse and γ that serve a checkpoint best under a budget, and store them with it.

    python recipes/tune_sampling.py --model outputs/cofre --budgets 96 192 --judge gpt2-large

Successive halving over random plans: few texts for each, more for the better ones. The score is generative perplexity;
a plan whose entropy falls more than `entropy_slack` under that of the defaults is out. The winner is kept only if it
beats the defaults by two standard errors on texts of another seed. It goes to `tuned_plans` in the checkpoint's
generation_config.json, and `generate(budget=96)` uses it from then on. Writes tuning.json (with provenance) and
tuning.md to `output_dir`. The same command goes on where it was interrupted.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import ModelName, parse_arguments
from fpmgm.evaluation import (
    clearly_below,
    evaluate_budgets,
    provenance,
    sampling_candidates,
    successive_halving,
)
from fpmgm.evaluation.budget_report import under_budgets
from fpmgm.evaluation.report import table, write_report
from fpmgm.evaluation.samples import check_setting
from judged_samples import (
    JudgedSamplesArguments,
    check_settings,
    device_of,
    open_judge,
    open_model,
    shown_perplexity,
)
from narration import say


@dataclass(kw_only=True)
class TuningArguments(JudgedSamplesArguments):
    """What to tune, on which judge, with how many texts."""

    model: ModelName = field(metadata={"help": "Folder, whose generation_config.json is rewritten, or hub name."})
    budgets: list[int] = field(default_factory=lambda: [96, 192, 384, 768], metadata={"help": "Block evaluations."})
    num_candidates: int = field(default=27, metadata={"help": "Plans tried for a budget, the defaults among them."})
    num_samples: list[int] = field(default_factory=lambda: [32, 96, 288], metadata={"help": "Texts of each rung."})
    factor: float = field(default=3.0, metadata={"help": "How many times fewer plans a rung has."})
    entropy_slack: float = field(default=0.05, metadata={"help": "Nats that a plan may lose against the defaults."})
    min_entropy: float | None = field(default=None, metadata={"help": "Least entropy, instead of the slack."})


class Study:
    """A model under a judge: measures plans, and keeps what it measured on disk."""

    def __init__(self, args: TuningArguments, device: str):
        self.args = args
        self.judge = open_judge(args, [args.model], device)
        self.model, self.tokenizer = open_model(args.model, device)

    def measure(self, budget: int, plan: dict, num_samples: int, seed: int) -> dict:
        """The row of a plan; earlier tuned plans play no part."""
        args, setting = self.args, {**plan, "tuned_plans": {}}
        return evaluate_budgets(
            self.model, self.tokenizer, self.judge, [budget], [setting], num_samples=num_samples,
            **{**args.sampling, "seed": seed, "progress_bar": False},
        )[0]  # fmt: skip

    def possible(self, budget: int, plan: dict) -> bool:
        """Whether the model can have a plan: orders that reveal a token at each step have as many steps at most."""
        try:
            check_setting(self.model, {"budget": budget, **plan, "tuned_plans": {}}, self.args.length)
        except ValueError:
            return False
        return True

    def allowed(self, row: dict, default: dict) -> bool:
        """Whether a row keeps enough entropy."""
        args = self.args
        least = default["unigram_entropy"] - args.entropy_slack if args.min_entropy is None else args.min_entropy
        return row["unigram_entropy"] >= least

    def tune(self, budget: int) -> dict:
        """The best plan for a budget, and whether it beats the defaults on new texts."""
        args = self.args
        plans = sampling_candidates(self.model.config, budget, args.num_candidates, args.seed)
        plans = [plan for plan in plans if self.possible(budget, plan)]

        def score(plan: dict, num_samples: int) -> float:
            row = self.measure(budget, plan, num_samples, args.seed)
            default = self.measure(budget, {}, num_samples, args.seed)  # of the cache, after the first time
            say(f"budget {budget}, {num_samples} texts: {shown_perplexity(row)} "
                f"(entropy {row['unigram_entropy']:.3f}) {plan or 'defaults'}")  # fmt: skip
            return row["generative_perplexity"] if self.allowed(row, default) else math.inf

        rungs = successive_halving(plans, score, args.num_samples, args.factor, keep=[0])
        winner = plans[rungs[-1][0].index]
        rows = {}
        for name, plan in (("default", {}), ("tuned", winner)):
            rows[name] = self.measure(budget, plan, args.num_samples[-1], args.seed + 1)
        measured = ("generative_perplexity", "generative_perplexity_standard_error")
        better = clearly_below(*(rows[name][measure] for name in ("tuned", "default") for measure in measured))
        kept = bool(winner) and better and self.allowed(rows["tuned"], rows["default"])
        trials = [[{"plan": plans[trial.index], **asdict(trial)} for trial in rung] for rung in rungs]
        return {"budget": budget, "plan": winner, "kept": kept, "new_texts": rows, "rungs": trials}


def main(argv: list[str] | None = None) -> dict:
    """Tune each budget and store the plans that win; returns what the JSON file holds."""
    (args,) = parse_arguments((TuningArguments,), __doc__, argv)
    device, folder = device_of(args), Path(args.output_dir)
    check_settings([args.model], lambda model: under_budgets(args.budgets, [{"tuned_plans": {}}]), args.length)
    study = Study(args, device)
    results = [study.tune(budget) for budget in args.budgets]
    found = {"budgets": results, "judge": study.judge.name, "arguments": asdict(args)}
    found["provenance"] = provenance(device)
    if PartialState().is_main_process:
        config = study.model.generation_config
        plans = {**config.tuned_plans, **{str(r["budget"]): r["plan"] if r["kept"] else None for r in results}}
        config = config.updated(tuned_plans={budget: plan for budget, plan in plans.items() if plan is not None})
        target = args.model if Path(args.model).is_dir() else folder
        write_report(folder / "tuning.json", found, markdown(found))
        config.save_pretrained(target)
        count = sum(result["kept"] for result in results)
        print(f"\n{markdown(found)}\ntuned plans kept: {count}, in {Path(target) / 'generation_config.json'}")
    return found


def markdown(found: dict) -> str:
    """Defaults and winners on new texts."""
    lines = []
    for result in found["budgets"]:
        rows = [result["new_texts"][name] for name in ("tuned", "default")]
        cells = [cell for row in rows for cell in (shown_perplexity(row), f"{row['unigram_entropy']:.3f}")]
        plan = ", ".join(f"{name} {value}" for name, value in result["plan"].items()) or "defaults"
        lines.append([result["budget"], plan, *cells, "yes" if result["kept"] else "no"])
    arguments = found["arguments"]
    columns = ["budget", "plan", "Gen. PPL", "entropy", "defaults: Gen. PPL", "entropy", "stored"]
    return (
        f"{table(columns, lines)}\n\n"
        f"± standard error, under {found['judge']} (mean over texts first, equation 4), on "
        f"{arguments['num_samples'][-1]} texts of another seed than the search's; "
        f"{arguments['num_candidates']} plans, rungs of {arguments['num_samples']}. Stored: better by two standard "
        "errors of the difference.\n"
    )


if __name__ == "__main__":
    main()
