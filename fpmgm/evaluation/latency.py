# SPDX-License-Identifier: Apache-2.0
"""Latency of generation by the paper's protocol: some batches to warm up, then timed ones (Section F.11)."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.arguments import check_whole
from .provenance import device_name
from .samples import check_call, sampling_protocol, timed_batch
from .store import ResultStore, finish


def measure_latency(
    model: PreTrainedModel,
    *,
    batch_size: int = 8,
    length: int | None = None,
    warmup_batches: int = 2,
    timed_batches: int = 20,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Seconds that `generate` takes from masked ids to the last token.

    The device is waited for before and after each batch. Decoding, scores, files, loading and warm-up are left out.

    Args:
        model (`PreTrainedModel`): A masked generative model.
        batch_size (`int`, defaults to 8): Sequences of a batch.
        length (`int`, *optional*): Tokens of a sequence. `None`: the model's longest.
        warmup_batches, timed_batches (`int`, defaults to 2 and 20): Batches that are not and that are timed; each
            process warms up.
        seed (`int`, defaults to 0): Of the samples.
        cache_dir (`str` or `Path`, *optional*): Keeps the times, so that a measurement that was interrupted goes on.
            `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the timed batches.
        options: Passed to `generate`.

    Returns:
        `dict`: `seconds_per_batch`, the mean, with `seconds_per_batch_standard_error`; `seconds_per_sequence`; and the
        `protocol`.

    Raises:
        `ValueError`: for less than 2 timed batches, or from `generate`.
    """
    timed_batches = check_whole("timed_batches", timed_batches, minimum=2, unit="batches")
    warmup_batches = check_whole("warmup_batches", warmup_batches, minimum=0, unit="batches")
    batch_size, length, seed = check_call(batch_size, length, seed)
    protocol = {
        "measure": "latency: seconds from masked ids to the last token, mean over batches",
        **sampling_protocol(model, options, length, batch_size, seed),
        "draw": "float64",
        "torch": str(torch.__version__),
        "device": device_name(model.device),
        "warmup_batches": warmup_batches,
    }
    store = ResultStore(cache_dir, protocol)

    def timed(batch: int) -> float:
        rows = range(batch * batch_size, (batch + 1) * batch_size)
        return timed_batch(model, seed, rows, length, options)["seconds"]

    def run(index: int) -> list[float]:
        if not warm:
            for batch in range(warmup_batches):
                timed(timed_batches + batch)
            warm.append(True)
        return [timed(index)]

    warm: list[bool] = []
    keys = [str(index) for index in range(timed_batches)]
    found = finish(store, [[key] for key in keys], run, "timing" if progress_bar else None)
    seconds = [found[key] for key in keys]
    return {
        "seconds_per_batch": statistics.mean(seconds),
        "seconds_per_batch_standard_error": statistics.stdev(seconds) / math.sqrt(timed_batches),
        "seconds_per_sequence": statistics.mean(seconds) / batch_size,
        "protocol": {**protocol, "timed_batches": timed_batches},
    }
