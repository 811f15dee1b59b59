# SPDX-License-Identifier: Apache-2.0
"""Publish a model that `digits.py` trained and judged, with a card of what was found.

    python recipes/release_digits.py --digits outputs/digits --row fp-maskgit_seed0 --target model_cards/digits

Weights are rounded to bfloat16 on disk and load as float32; what the card says of samples is measured with these.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModel

from digits import DigitsArguments, draw_picture, measure, open_digits, sample
from fpmgm.command_line import LocalPath, parse_arguments
from fpmgm.evaluation import provenance
from fpmgm.evaluation.report import write_report
from fpmgm.model_cards.escape import PLACES
from study.release import save_rounded


TEMPLATE = Path(__file__).with_name("study") / "digits_card.md"
PICTURE = "digits.png"


@dataclass(kw_only=True)
class ReleaseDigitsArguments:
    """What to publish, and where."""

    digits: LocalPath = field(metadata={"help": "Folder that digits.py wrote."})
    row: str = field(metadata={"help": "Which of its models: the name of a folder there."})
    target: str = field(default="model_cards/digits", metadata={"help": "Where it is published."})


def main(argv: list[str] | None = None) -> None:
    """Write weights and code, `results.json`, a picture and the card."""
    (args,) = parse_arguments((ReleaseDigitsArguments,), __doc__, argv)
    export, folder = Path(args.digits) / args.row, Path(args.target)
    found = json.loads((export / "run.json").read_text(encoding="utf-8"))
    save_rounded(AutoModel, export, folder)
    model, digits = AutoModel.from_pretrained(folder), open_digits()
    options = DigitsArguments(**{**found["options"], "reuse": [model.generation_config.reuse]})
    results = {
        "name": folder.name,
        **{name: found[name] for name in ("model", "further", "seed", "parameters", "steps", "cpu_seconds_per_step")},
        "validation_loss": found["validation_loss"],
        "options": found["options"],
        "held_out": measure(digits, digits.codes, digits.labels),
        "samples": sample(options, digits, model, seed=found["seed"] + 1),  # draws that no choice was made by
        "tokens_of_budget_24": model.generate(batch_size=2, budget=24, seed=0).tolist(),
        "provenance": provenance("cpu"),
    }
    write_report(folder / "results.json", results)
    draw_picture(options, [folder], folder / PICTURE)
    write_card(folder, results)
    print(f"{folder}: validation cross-entropy {results['validation_loss']:.3f}")


def write_card(folder: Path, results: dict) -> None:
    """README.md, from `results` alone."""
    data = ModelCardData(
        license="apache-2.0", library_name="transformers", tags=["fpmgm", "masked-image-generation", "digits"],
        model_name=results["name"],
    )  # fmt: skip
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), picture=PICTURE, **PLACES, **results)
    card.save(folder / "README.md")


if __name__ == "__main__":
    main()
