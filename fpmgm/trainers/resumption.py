# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is one of this run: what its record says is compared, and each difference is named."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import TrainingArguments
from transformers.utils import logging

from .checkpoints import read_json
from .run_record import RUN_FILE


logger = logging.get_logger(__name__)

# What a change of an option means for a resumed run. Options in neither table may change and are named in a warning:
# they hold from the checkpoint on.
MUST_STAY = {
    "the optimizer's state in the checkpoint holds it": (
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
        "optim_target_modules",
    ),
    "the schedule's state in the checkpoint belongs to it": ("lr_scheduler_type", "lr_scheduler_kwargs"),
    "the order of the data and the noise follow from it": (
        "seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy", "length_column_name",
        "sequences_per_step", "stream_workers",
    ),
    "which teacher a step has follows from it": (
        "rounds", "steps_per_round", "teacher_steps", "first_step_size",
    ),
    "its state in the checkpoint is in another form": ("engine",),
}  # fmt: skip
# Where things are written, shown and pushed; `Trainer` itself warns of the three numbers of steps.
MAY_CHANGE = {
    "output_dir", "data_description", "ignore_data_change", "resume_from_checkpoint", "logging_steps", "eval_steps",
    "save_steps", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint",
    "restore_callback_states_from_checkpoint", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "torch_empty_cache_steps", "skip_memory_metrics",
    "ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout",
    "ddp_find_unused_parameters", "do_train", "do_eval", "do_predict", "local_rank", "debug", "label_names",
}  # fmt: skip
WORDS = {
    "sequences_per_step": "sequences in an optimizer step (`per_device_train_batch_size` · "
    "`gradient_accumulation_steps` · processes)",
    "stream_workers": "`dataloader_num_workers` of a stream",
    "engine": "the engine that splits the training",
    "train": "the training rows",
    "eval": "the evaluation rows",
    "trained": "the tensors that are trained",
    "frozen": "the weights that are not trained",
    "teacher": "the teacher's weights",
}


class Difference(NamedTuple):
    """A value of this run beside that of a checkpoint; `part` is the part of the record that it stands in."""

    part: str
    name: str
    here: Any
    there: Any


def options_of(args: TrainingArguments) -> dict[str, Any]:
    """The options whose change means something to a resumed run."""
    return {name: value for name, value in args.to_dict().items() if name not in MAY_CHANGE}


def check_same_run(folder: str, record: dict[str, dict], processor: Any, ignore_data_change: bool) -> bool:
    """Compare the checkpoint `folder` with the `record` of the run that is to go on from it.

    Warns of options that differ and may; those hold from here on.

    Args:
        folder (`str`): A whole checkpoint.
        record (`dict`): What the run's next checkpoints will hold.
        processor: Its tokenizer or image processor, or `None`.
        ignore_data_change (`bool`): Whether other data is no error.

    Returns:
        `bool`: Whether every option is the same.

    Raises:
        `ValueError`: if the checkpoint is one of another run, naming what differs.
    """
    path = Path(folder) / RUN_FILE
    if not path.exists():
        logger.warning(
            f"{folder} has no {RUN_FILE}, as checkpoints of earlier versions: whether it belongs to this run is not "
            "checked. Checkpoints from here on have one."
        )
        return True
    found = differences(record, read_json(path, "the record of a run"))
    reasons = {name: why for why, names in MUST_STAY.items() for name in names}
    data = [d for d in found if d.part == "data"]
    named = [d for d in found if d.part == "arguments" and d.name not in reasons]
    wrong = [d for d in found if d not in named and not (ignore_data_change and d in data)]
    if wrong:
        texts = [_describe(d, folder, processor, reasons.get(d.name)) for d in wrong]
        remedy = " With changed data alone, `ignore_data_change=True` goes on." if data else ""
        raise ValueError(
            f"`resume_from_checkpoint`={folder!r} is a checkpoint of another run: {'; '.join(texts)}. Go on with what "
            f"that run began with, or begin a new one in another `output_dir`.{remedy}"
        )
    for chosen, words in ((data, "other data"), (named, "other options")):
        if chosen:
            texts = [_describe(d, folder, processor) for d in chosen]
            logger.warning(
                f"{folder} goes on with {words} than it was made with: {'; '.join(texts)}. They hold from here on; "
                "give the former for the run as it began."
            )
    return not named


def differences(here: dict[str, dict], there: dict[str, dict]) -> list[Difference]:
    """Where two records differ in what both know; another version may know more or less."""
    return [
        Difference(part, name, here[part][name], there[part][name])
        for part in here
        if isinstance(there.get(part), dict)
        for name in sorted(here[part].keys() & there[part].keys())
        if here[part][name] != there[part][name]
    ]


# --- words -----------------------------------------------------------------------------------------------------------


def _describe(difference: Difference, folder: str, processor, reason: str | None = None) -> str:
    _, name, here, there = difference
    if name == "tokenizer":
        return f"the tokenizer is another ({_changed_ids(folder, processor) or 'see the folder'})"
    if isinstance(here, list) and isinstance(there, list) and any(isinstance(x, dict) for x in (*here, *there)):
        return f"`{name}` ({_changed_files(here, there)})"
    words = WORDS.get(name, f"`{name}`")
    if isinstance(here, dict) and isinstance(there, dict) and "sha256" in here:
        counts = [f"{value} {unit}" for unit, value in here.items() if unit != "sha256" and value != there.get(unit)]
        former = [f"{there[unit]} {unit}" for unit in here if unit != "sha256" and here[unit] != there.get(unit)]
        return f"{words} ({', '.join(counts)}, not {', '.join(former)})" if counts else f"{words} (of other content)"
    if name in ("frozen", "teacher"):
        return f"{words} (of other content)"
    text = f"{words}={_short(here)}, not {_short(there)}"
    return f"{text} ({reason})" if reason else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _changed_files(here: list[dict], there: list[dict]) -> str:
    if len(here) != len(there):
        return f"{len(here)} files, not {len(there)}"
    i, (now, then) = next((i, pair) for i, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1])
    if now["bytes"] != then["bytes"]:
        return f"file {i + 1} has {now['bytes']:,} bytes, not {then['bytes']:,}"
    return f"file {i + 1} has other content, {now['sha256'][:12]} and not {then['sha256'][:12]} by SHA-256"


def _changed_ids(folder: str, processor) -> str | None:
    """How many ids mean another token than in the tokenizer that the checkpoint holds, where it holds one."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file() or not hasattr(processor, "get_vocab"):
        return None
    there = {i: token for token, i in Tokenizer.from_file(str(path)).get_vocab().items()}
    here = {i: token for token, i in processor.get_vocab().items()}
    changed = sum(here.get(i) != there.get(i) for i in here.keys() | there.keys())
    return f"{changed} of {len(here.keys() | there.keys())} ids mean other tokens" if changed else "its rules differ"
