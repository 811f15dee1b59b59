# SPDX-License-Identifier: Apache-2.0
"""A `Trainer` that can be cut off anywhere: its checkpoints are whole, and what resumes from one is the same run."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .checkpoints import (
    STAGING_FOLDER,
    checkpoint_to_resume,
    describe_failure,
    publish,
    reading,
    remove_oldest,
)
from .engines import describe_engine
from .lock import hold_folder
from .random_states import get_random_states, kept_random_states, set_random_states
from .resumption import check_same_run, options_of
from .run_record import RUN_FILE, Origin, as_json, describe_model, describe_processor, describe_rows, known
from .shards import part_of


logger = logging.get_logger(__name__)


class AtomicCheckpointTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole or not there, and which goes on from those of the same run, bit for bit.

    Args:
        args (`TrainingArguments`): With `ignore_data_change`.
        origin ([`Origin`], *optional*): What the run is made from beyond what the trainer sees. `None`: nothing.
        kwargs: Passed to `Trainer`.
    """

    last_saved: tuple[int, Path] | None = None  # step and folder of the checkpoint last written or resumed from
    _staging = False
    _put_off = False  # a checkpoint, to the end of the epoch
    _random = (None, ())  # a step, and the states of the random numbers at its end
    _logged = (None, {}, 0)  # a step, what its end left for the next log line, and of operations to count
    _stopped = False  # by a rule, before the checkpoint that is resumed from

    def __init__(self, *args, origin: Origin | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.origin = Origin() if origin is None else origin
        if self.args.enable_jit_checkpoint:
            self.add_callback(SaveAndStop(self.pop_callback(JITCheckpointCallback)))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args, **kwargs):
        """As in `Trainer`.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*): A whole checkpoint; `True`: the last in
                `output_dir` that is whole. `None`: begin anew.
            args, kwargs: Passed to `Trainer.train`.

        Raises:
            `ValueError`: if the checkpoint is not whole or belongs to another run, or another process trains in
                `output_dir`.
            `OSError`: when a checkpoint cannot be written, say to a full disk. Those written before are left intact.
        """
        with hold_folder(self.args.output_dir, take=self.args.should_save):
            folder = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
            self._recorded, same = self.run_record(), False
            if folder is not None:
                same = check_same_run(folder, self._recorded, self.processing_class, self.args.ignore_data_change)
            self._stopped = same and was_stopped(folder)
            self.forget_steps()
            return super().train(folder, *args, **kwargs)

    def run_record(self) -> dict[str, dict]:
        """What makes this run the one it is, as its checkpoints hold it."""
        args, rows = self.args, known(train=describe_rows(self.train_dataset), eval=describe_rows(self.eval_dataset))
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        derived = {"sequences_per_step": sequences, "engine": describe_engine(self)}
        if isinstance(self.train_dataset, IterableDataset):
            derived["stream_workers"] = args.dataloader_num_workers  # each of which reads a part, and shuffles it
        return as_json(
            {
                **describe_model(self.model),
                "processor": known(tokenizer=describe_processor(self.processing_class)),
                "data": {**rows, **self.origin.data},
                "options": self.origin.options,
                "arguments": {**options_of(args), **derived},
            }
        )

    # --- going on -----------------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.args.should_save:  # what an interrupted run left
            shutil.rmtree(Path(self._get_output_dir(trial)) / STAGING_FOLDER, ignore_errors=True)
        self.last_saved = None
        if resume_from_checkpoint is None:
            return position
        self.last_saved = (self.state.global_step, Path(resume_from_checkpoint).resolve())
        self._find_best(Path(resume_from_checkpoint).parent)
        if num_train_epochs != sys.maxsize or self.args.ignore_data_skip:
            return position
        # `Trainer` takes all steps of a stream for one epoch, also where the stream has ended and begun again.
        saved = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        return stream_position(saved.epoch, saved.max_steps * self.args.gradient_accumulation_steps)

    def _find_best(self, folder: Path) -> None:
        """`Trainer` forgets the best checkpoint of a folder that was moved."""
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_callback_state(self):
        """Give callbacks, such as early stopping, what they had counted; in place, so that their order stays."""
        if self.args.restore_callback_states_from_checkpoint:  # and with the options that they had there
            super()._load_callback_state()
            return
        saved = {}
        for name, states in self.state.stateful_callbacks.items():
            saved[name] = states if isinstance(states, list) else [states]
        for callback in self.callback_handler.callbacks:
            states = saved.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and states:
                vars(callback).update(states.pop(0)["attributes"])

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            bad = [name for name, p in self.model.named_parameters() if not part_of(p).isfinite().all()]
            if bad:
                raise ValueError(f"values that are not finite in {bad[0]}")

    def _issue_warnings_after_load(self, load_result):
        elsewhere = {*getattr(self.model, "all_tied_weights_keys", ()), *(self.model._keys_to_ignore_on_save or ())}
        missing = set(load_result.missing_keys) - elsewhere
        wrong = sorted(missing | set(load_result.unexpected_keys))
        if wrong:
            raise ValueError(f"{wrong[0]} is missing or unknown, and {len(wrong) - 1} more")

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading(checkpoint, "the states of optimizer and schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.should_save and checkpoint is not None and not (Path(checkpoint) / "scheduler.pt").is_file():
            logger.warning(
                f"{checkpoint} holds the model alone (`save_only_model`): the optimizer begins anew, and the run is "
                "not the one it would have been. Leave `save_only_model` off to go on."
            )

    def _load_rng_state(self, checkpoint):
        with reading(checkpoint, "the states of the random numbers"):
            super()._load_rng_state(checkpoint)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self.state.global_step > 0:  # `eval_on_start` of a resumed run: it is in the log
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def evaluation_loop(self, *args, **kwargs):
        """As in `Trainer`; the global random numbers, which loading data draws from too, stay those of training."""
        with kept_random_states():
            return super().evaluation_loop(*args, **kwargs)

    def _run_epoch(self, *args, epoch, epochs_trained, resume_from_checkpoint=None, **kwargs):
        # resumed from the last step, where `Trainer` would add one, or from where a rule ended it
        if self.state.global_step >= self.state.max_steps or self._stopped:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        if resume_from_checkpoint is not None and epoch == epochs_trained:
            self._load_log(Path(resume_from_checkpoint))
        where = {"epoch": epoch, "epochs_trained": epochs_trained, "resume_from_checkpoint": resume_from_checkpoint}
        super()._run_epoch(*args, **where, **kwargs)

    # --- what the next log line is made of ----------------------------------------------------------------------

    def forget_steps(self) -> None:
        """Drop what earlier steps, of a run that failed in this process, left for the next log line."""
        self._random, self._logged, self._put_off = (None, ()), (None, {}, 0), False
        self.current_flos = 0

    def since_log(self) -> dict[str, list[torch.Tensor]]:
        """What this rank has collected since the last log line, by name."""
        steps = torch.tensor(self.state.global_step - self._globalstep_last_logged)
        return {"loss": [self._tr_loss.clone()], "steps": [steps]}

    def go_on_since_log(self, collected: dict[str, list[torch.Tensor]]) -> None:
        """Go on from what [`since_log`] gave."""
        (self._tr_loss,), (steps,) = collected["loss"], collected["steps"]
        self._globalstep_last_logged = self.state.global_step - int(steps)

    def _log_file(self, folder: Path) -> Path:
        return folder / f"log_{self.args.process_index}.safetensors"

    def _load_log(self, folder: Path) -> None:
        path = self._log_file(folder)
        if path.is_file():  # else the checkpoint is an earlier version's, or was written by fewer processes
            with reading(folder, path.name):
                collected = {name: values.to(self.args.device) for name, values in load_file(path).items()}
                self.go_on_since_log({name: list(values) for name, values in collected.items()})

    # --- saving -------------------------------------------------------------------------------------------------

    def save_beside(self, folder: Path) -> None:
        """Write into a checkpoint what is needed to go on, beside what `Trainer` does. All ranks call it."""
        step, collected, _ = self._logged
        if step != self.state.global_step:  # else the next step may have begun: a stop saves in its middle
            collected = self.since_log()
        save_file({name: torch.stack(values) for name, values in collected.items()}, self._log_file(folder))
        if self.args.should_save:
            (folder / RUN_FILE).write_text(json.dumps(self._recorded, indent=2) + "\n", encoding="utf-8")

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        step, at_step_end = self.state.global_step, self._random[0] != self.state.global_step
        self._random, self._logged = (step, get_random_states()), (None, {}, 0)
        # The end of an epoch may log and evaluate once more for its last step: a checkpoint of it waits for that.
        if at_step_end and self._ends_epoch():
            self._put_off, self.control.should_save = self.control.should_save, False
        else:
            self.control.should_save |= self._put_off
            self._put_off = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._logged = (step, self.since_log(), self.current_flos)

    def _ends_epoch(self) -> bool:
        stops = self.control.should_training_stop or self.control.should_epoch_stop
        return stops or float(self.state.epoch).is_integer()

    def _save_checkpoint(self, model, trial):
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.last_saved == (step, folder.resolve()):
            return
        staged = run_dir / STAGING_FOLDER / folder.name
        if self._logged[0] == step:  # the next step may have begun
            self.current_flos = self._logged[2]
        try:
            self._write_staged(model, trial, staged, folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk in Python, torch and safetensors
            raise OSError(describe_failure(folder, error)) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
        if self.args.should_save:
            remove_oldest(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # it has its name
        self.last_saved = (step, folder.resolve())
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _write_staged(self, model, trial, staged: Path, folder: Path) -> None:
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.state.best_model_checkpoint is not None and Path(self.state.best_model_checkpoint) == staged:
            self.state.best_model_checkpoint = str(folder)
        self.save_beside(staged)
        self.accelerator.wait_for_everyone()  # all ranks have written
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            publish(staged, folder)

    def _save_rng_state(self, output_dir):
        step, states = self._random
        with kept_random_states():
            if step == self.state.global_step:  # the next step may have begun: a stop or a signal saves in its middle
                set_random_states(states)
            super()._save_rng_state(output_dir)

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_FOLDER) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._staging:  # uploads run in the background: the folder must keep its name
            super()._push_from_checkpoint(checkpoint_folder)


class SaveAndStop(JITCheckpointCallback):
    """With `enable_jit_checkpoint`, SIGTERM lets the step in progress end; it is logged and evaluated where that is
    due, and saved, and training stops. The checkpoint does not say that it stopped: what resumes from it goes on.

    Args:
        callback (`JITCheckpointCallback`): The one of `Trainer`, whose checkpoint may lie within a step. This one
            takes its place and its handler of the signal.
    """

    def __init__(self, callback: JITCheckpointCallback):
        super().__init__()
        self.trainer, self.jit_manager = callback.trainer, callback.jit_manager
        self._saving = False

    def on_pre_optimizer_step(self, *args, **kwargs):
        pass

    on_step_begin = on_epoch_end = on_pre_optimizer_step

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(float(self.jit_manager.is_checkpoint_requested), device=args.device)
        self._saving = bool(self.trainer.accelerator.reduce(asked))  # the same on all ranks
        control.should_save |= self._saving

    def on_save(self, args, state, control, **kwargs):
        if self._saving:
            control.should_training_stop, self.jit_manager.is_checkpoint_requested = True, False


def was_stopped(folder: str) -> bool:
    """Whether a rule had ended the training that wrote the checkpoint `folder`, before its last step."""
    state = TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
    stopped = state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop")
    return bool(stopped) and state.global_step < state.max_steps


def stream_position(epoch: float, batches_per_epoch: int) -> tuple[int, int]:
    """Full passes over a stream, and batches of the pass after them, from the number of epochs that `Trainer` records.

    >>> stream_position(2.25, batches_per_epoch=8), stream_position(1.0, batches_per_epoch=8)
    ((2, 2), (0, 8))
    """
    passes = max(0, math.ceil(epoch) - 1)
    return passes, round((epoch - passes) * batches_per_epoch)
