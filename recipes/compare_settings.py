# SPDX-License-Identifier: Apache-2.0
"""Settings of `generate` side by side: what trained models write with each under each budget, and what that costs.

    python recipes/compare_settings.py --model model_cards/stories-fp-mdlm --truth stories260K \\
        --settings recipes/configs/settings/switches.yaml

`--settings` is a YAML of a name for each setting and its options, beside the model's own:
`{far apart: {order: halton}, frozen: {freeze: true, refresh_every: 4}}`. Judged by the truth that the models learnt,
or by the judges of recipes/budget_report.py. It goes on where it was interrupted, and writes what it has after every
setting: `OUTPUT.json`, `.md` and, at the end, `.png`.
"""

import math
from dataclasses import asdict, dataclass, field

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.analysis.axes import finish, logarithmic_values, new_figure, save
from fpmgm.command_line import LocalPath, ModelName, parse_arguments, read_yaml
from fpmgm.evaluation import TruthJudge, evaluate_budgets, plus_minus, provenance, unigram_entropy
from fpmgm.evaluation.budget_report import under_budgets
from fpmgm.evaluation.report import short_names, table, write_report
from judged_samples import (
    JudgedSamplesArguments,
    check_settings,
    device_of,
    fitting_options,
    open_judge,
    open_model,
)


KEPT = ("excess", "excess_standard_error", "generative_perplexity", "generative_perplexity_standard_error")
KEPT += ("unigram_entropy", "repetition_4", "num_steps", "tokens_per_step", "block_evaluations")
KEPT += ("mean_block_evaluations", "sample")


@dataclass(kw_only=True)
class CompareSettingsArguments(JudgedSamplesArguments):
    """What is compared."""

    model: list[ModelName] = field(metadata={"help": "Folders or hub names."})
    settings: LocalPath = field(metadata={"help": "YAML: a name for each setting and its options of generate."})
    budgets: list[int] = field(default_factory=lambda: [24, 48, 96, 192], metadata={"help": "Block evaluations."})
    num_samples: int = field(default=256, metadata={"help": "Texts of each setting and budget."})
    output_dir: str = field(default="outputs/settings", metadata={"help": "Keeps finished batches."})
    output: str = field(default="settings", metadata={"help": "Written with .json, .md and .png."})


def main(argv: list[str] | None = None) -> dict:
    """Sample, judge, write; returns what the JSON file holds."""
    (args,) = parse_arguments((CompareSettingsArguments,), __doc__, argv)
    device, settings, titles = device_of(args), read_settings(args.settings), short_names("model", args.model)

    def settings_of(model) -> list[dict]:
        return under_budgets(args.budgets, fitting(settings, model.config).values())

    check_settings(args.model, settings_of, args.length)
    judge = open_judge(args, args.model, device)
    paths = {"model", "settings", "truth", "output", "output_dir", "judge", "judge_text_files"}
    result = {
        "provenance": provenance(device),
        "arguments": {name: value for name, value in asdict(args).items() if name not in paths},
        "judge": judge.name,
        "truth": describe_truth(judge) if isinstance(judge, TruthJudge) else None,
        "rows": [],
    }
    for title, path in zip(titles, args.model, strict=True):
        model, tokenizer = open_model(path, device)
        for name, options in fitting(settings, model.config).items():
            measured = evaluate_budgets(
                model, tokenizer, judge, args.budgets, [options], num_samples=args.num_samples, **args.sampling
            )
            for budget, row in zip(args.budgets, measured, strict=True):
                found = {"model": title, "setting": name, "options": options, "budget": budget}
                result["rows"].append(found | {key: row[key] for key in KEPT if key in row})
            write_report(f"{args.output}.json", result, markdown(result))
    draw(result, f"{args.output}.png")
    print(markdown(result))
    return result


def read_settings(path: str) -> dict[str, dict]:
    """The settings of a YAML file.

    Raises:
        `ValueError`: for anything but options of names.
    """
    settings = read_yaml("settings", path)
    if not settings or not all(isinstance(options, dict) for options in settings.values()):
        raise ValueError(f"`settings`: {path} must give each name its options, such as far apart: {{order: halton}}.")
    return settings


def fitting(settings: dict[str, dict], config) -> dict[str, dict]:
    """The settings that a model can have; what differs only in options that it has not stands once."""
    if config.can_reuse:
        return settings
    found: dict[str, dict] = {}
    for name, options in settings.items():
        options = fitting_options(options, config)
        if options not in found.values():
            found[name] = options
    return found


def describe_truth(judge: TruthJudge) -> dict:
    """What the truth's own texts measure."""
    return {"entropy_rate": judge.entropy_rate, "unigram_entropy": unigram_entropy(judge.references.tolist())}


def markdown(result: dict) -> str:
    """A line for each model and setting, under each budget what was judged, the entropy and what was spent."""
    judged = "excess" if result["truth"] is not None else "generative_perplexity"
    budgets, lines = result["arguments"]["budgets"], []
    for (model, setting), rows in by_setting(result["rows"]).items():
        cells = [
            f"{plus_minus(row[judged], row[f'{judged}_standard_error'], 3)}; {row['unigram_entropy']:.3f}; "
            f"{row['mean_block_evaluations']:.0f} in {row['num_steps']}"
            for row in rows
        ]
        lines.append([model, setting, *cells])
    note = (
        f"{judged.replace('_', ' ').capitalize()} ± one standard error, {result['arguments']['num_samples']} texts; "
    )
    note += "unigram entropy of a text; mean block evaluations in at most so many steps."
    if result["truth"] is not None:
        note += f" Unigram entropy of the truth: {result['truth']['unigram_entropy']:.3f}."
    return f"{table(['model', 'setting', *(f'budget {budget}' for budget in budgets)], lines)}\n\n{note}\n"


def by_setting(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows by model and setting, those of a setting by budget."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["model"], row["setting"]), []).append(row)
    return found


def draw(result: dict, path: str) -> None:
    """What was judged, with its standard error, against the budget: a panel for each model."""
    judged = "excess" if result["truth"] is not None else "generative_perplexity"
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    names = list(dict.fromkeys(row["setting"] for row in result["rows"]))
    figure, handles = new_figure(1.8 + 4.2 * len(models), 4), {}
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for (of, name), rows in by_setting(result["rows"]).items():
            if of == model:
                y = [row[judged] for row in rows]
                error = [math.nan if (e := row[f"{judged}_standard_error"]) is None else e for row in rows]
                look = {"color": f"C{names.index(name) % 10}", "marker": "o", "markersize": 4, "capsize": 2}
                handles[name] = axes.errorbar([row["budget"] for row in rows], y, error, **look)
        logarithmic_values(axes, result["arguments"]["budgets"])
        label = "excess (nats per token)" if judged == "excess" else "generative perplexity"
        finish(axes, legend=False, title=model, xlabel="budget (block evaluations per text)", ylabel=label)
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
