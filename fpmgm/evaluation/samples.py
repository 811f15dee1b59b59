# SPDX-License-Identifier: Apache-2.0
"""Many samples of a model, in batches that an interruption does not lose, with their cost."""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.arguments import SEED, check_whole
from ..models.guidance import check_classes
from ..models.reveal import RevealTask
from .provenance import device_name
from .store import ResultStore, configuration, fingerprint, finish


@dataclass(frozen=True)
class Samples:
    """Sequences of one setting and what each cost.

    Args:
        sequences (`torch.LongTensor`): (N, L) token ids.
        num_steps (`int`): Denoising steps, of the sequence that took most.
        iterations (`list[int]`): Fixed-point iterations of each step.
        tokens_per_step (`float`): Tokens over the steps that ran to write them.
        block_evaluations (`int`): Of the most costly sequence.
        mean_block_evaluations (`float`): Of a sequence.
        milliseconds_per_sequence (`float`): Median over batches of their time over their size, on one device; the
            first batch of each process, which warms up, is left out where there are others.
        timed_on (`str`, *optional*): That device: this one, unless all batches are another's, kept in `cache_dir`.
            `None`: an earlier version has not noted it.
        tuned_plan (`dict`, *optional*): The checkpoint's tuned plan for this budget, where it was used.
        protocol (`dict`): Model, options, seed and batch size.
    """

    sequences: torch.LongTensor
    num_steps: int
    iterations: list[int]
    tokens_per_step: float
    block_evaluations: int
    mean_block_evaluations: float
    milliseconds_per_sequence: float
    timed_on: str | None
    tuned_plan: dict | None
    protocol: dict[str, Any]


def sample_sequences(
    model: PreTrainedModel,
    num_samples: int,
    *,
    batch_size: int = 8,
    length: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
    **options: Any,
) -> Samples:
    """Sample `num_samples` sequences by `model.generate`; fewer of them are the first ones of more.

    With `torch.distributed` initialized, the processes share the batches and all return the same.

    Args:
        model (`PreTrainedModel`): A masked generative model.
        num_samples (`int`): Sequences N.
        batch_size (`int`, defaults to 8): Sequences per call of `generate`.
        length (`int`, *optional*): Tokens of a sequence. `None`: the model's longest.
        seed (`int`, defaults to 0): Sequence k has a seed of its own, made of this one and k.
        cache_dir (`str` or `Path`, *optional*): Keeps finished batches, so that a run that was interrupted goes on.
            `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the batches.
        options: Passed to `generate`: `budget`, `reuse`, `temperature`, `top_p`, …; plain values, which a file can
            hold.

    Returns:
        [`Samples`].

    Raises:
        `ValueError`: for an option that is no plain value, and from `generate`.
    """
    num_samples = check_whole("num_samples", num_samples, minimum=1, unit="sequences")
    batch_size, length, seed = check_call(batch_size, length, seed)
    protocol = sampling_protocol(model, options, length, batch_size, seed)
    store = ResultStore(cache_dir, protocol)
    spans = [(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]
    keys = [f"{start}-{stop}" for start, stop in spans]

    ran = []

    def run(index: int) -> list[dict]:
        ran.append(index)
        batch = timed_batch(model, seed, range(*spans[index]), length, options)
        return [{**batch, "warms_up": len(ran) == 1}]

    title = f"sampling {', '.join(f'{name} {value}' for name, value in options.items())}"
    found = finish(store, [[key] for key in keys], run, title if progress_bar else None)
    batches = [found[key] for key in keys]
    steps = sum(batch.get("steps", batch["num_steps"] * len(batch["sequences"])) for batch in batches)
    spent = sum(batch.get("spent", batch["block_evaluations"] * len(batch["sequences"])) for batch in batches)
    longest = max(batches, key=lambda batch: batch["num_steps"])
    here = device_name(model.device)
    timed_on = here if any(batch.get("device") == here for batch in batches) else batches[0].get("device")
    timed = [batch for batch in batches if batch.get("device") == timed_on]
    warm = [batch for batch in timed if not batch["warms_up"]] or timed
    return Samples(
        sequences=torch.tensor([row for batch in batches for row in batch["sequences"]]),
        num_steps=longest["num_steps"],
        iterations=longest["iterations"],
        tokens_per_step=sum(len(row) for batch in batches for row in batch["sequences"]) / steps,
        block_evaluations=max(batch["block_evaluations"] for batch in batches),
        mean_block_evaluations=spent / num_samples,
        milliseconds_per_sequence=1000 * statistics.median(b["seconds"] / len(b["sequences"]) for b in warm),
        timed_on=timed_on,
        tuned_plan=batches[0]["tuned_plan"],
        protocol=protocol,
    )


def check_call(batch_size: int, length: int | None, seed: int) -> tuple[int, int | None, int]:
    """What every call of `generate` is given, as plain whole numbers."""
    batch_size = check_whole("batch_size", batch_size, minimum=1, unit="sequences")
    length = None if length is None else check_whole("length", length, minimum=1, unit="tokens")
    return batch_size, length, SEED.check("seed", seed)


def sampling_protocol(
    model: PreTrainedModel, options: dict[str, Any], length: int | None, batch_size: int, seed: int
) -> dict[str, Any]:
    """All that samples depend on.

    Raises:
        `ValueError`: of [`check_options`].
    """
    check_options(options)
    defaults = model.generation_config.to_dict()
    unused = {"transformers_version", *options}  # a default that an option replaces changes nothing
    return {
        "model": model.name_or_path,
        "model_weights": fingerprint(model),
        "model_configuration": configuration(model),
        "generation_defaults": {k: v for k, v in defaults.items() if not k.startswith("_") and k not in unused},
        "options": options,
        "length": length or model.config.max_position_embeddings,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        # Another rounding, and another time.
        "attention": getattr(model.config, "_attn_implementation", None),
        "compiled": any(module._compiled_call_impl is not None for module in model.modules()),
    }


def check_options(options: dict[str, Any]) -> None:
    """Raise a `ValueError` for an option that is no plain value, or is not the caller's."""
    for name, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` is of type {type(value).__name__}: give values that JSON can hold.") from error
    for name in {"return_dict_in_generate", "progress_bar"} & set(options):
        raise ValueError(f"`{name}` is set here, not in a setting: leave it out.")
    if options.get("stop_at_eos"):
        raise ValueError("`stop_at_eos`=True cuts texts, but these are of one length: leave it out.")


def check_setting(
    model: PreTrainedModel, options: dict[str, Any], length: int | None = None, reveals: bool = True
) -> None:
    """Raise at once what [`sample_sequences`] would raise of these options in the midst of an evaluation; `reveals`:
    also that an order which reveals a token at each step has more steps than the `length` has tokens."""
    check_options(options)
    options = of_one_length(model, options)
    # The steps of `generate` before the first denoising step, of the checkpoint's own code.
    config, _ = model._configure(None, options)
    order, mask = model._order(config, options), model.config.mask_token_id
    check_classes(None, config.guidance_scale, model.config.num_classes)
    tokens, _ = model._start(None, 1, length, None, None, None)
    wanted = tokens == mask
    plan = model._plan(config, wanted)
    if reveals:
        order(RevealTask(wanted, wanted, plan.num_steps, mask, config, 0, None))


def of_one_length(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, with which no text is cut at its end, as a model's defaults may say for single texts."""
    return {**options, "stop_at_eos": False} if getattr(model.generation_config, "stop_at_eos", False) else options


def timed_batch(
    model: PreTrainedModel, seed: int, rows: range, length: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """One call of `generate` by the clock, as plain values: from masked ids to the last token, nothing else.

    Each of the `rows` of all that is sampled from `seed` has a seed of its own, whatever the batches."""
    options, seeds = of_one_length(model, options), [(seed << 32) + row for row in rows]
    _wait(model.device)
    start = time.perf_counter()
    out = model.generate(batch_size=len(seeds), length=length, seed=seeds, return_dict_in_generate=True, **options)
    _wait(model.device)
    steps = getattr(out, "num_steps_per_sequence", None)  # a checkpoint's own code may be older
    return {
        "seconds": time.perf_counter() - start,
        "device": device_name(model.device),
        "sequences": out.sequences.tolist(),
        "num_steps": out.num_steps,
        "iterations": out.iterations,
        "steps": out.num_steps * len(seeds) if steps is None else int(steps.sum()),
        "block_evaluations": out.block_evaluations,
        "spent": int(out.block_evaluations_per_sequence.sum()),
        "tuned_plan": getattr(out, "tuned_plan", None),
    }


def _wait(device: torch.device) -> None:
    """Until the device is done, so that a clock measures its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
