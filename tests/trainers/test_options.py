# SPDX-License-Identifier: Apache-2.0
"""Every argument of `TrainingArguments`, of `Trainer` and of our configurations is honoured, is `transformers`' own
business, or is refused by name. A new one fails here until someone has looked at it."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from fpmgm.trainers import (
    ConsistencyConfig,
    ConsistencyTrainer,
    ConversionConfig,
    ConversionTrainer,
    ImageTokenizerConfig,
    ImageTokenizerTrainer,
    MGMTrainer,
    MGMTrainingConfig,
    SDTTConfig,
    SDTTTrainer,
)
from fpmgm.trainers.options import REFUSED, REFUSED_BY_MGM

from ..testing_utils import CHECKPOINTING, RENAMED, refused, tiny_image_model, tiny_image_tokenizer
from .training_utils import LENGTH, MASK, CallOnce, make_trainer, token_rows, training_model


# Our code stands between these and `Trainer`: the test that shows what they do.
OURS = {
    "max_steps": "test_epochs_plan_a_run_and_two_lengths_are_refused",
    "num_train_epochs": "test_epochs_plan_a_run_and_two_lengths_are_refused",
    "per_device_train_batch_size": "test_loss_and_gradient_are_those_of_the_masked_cross_entropy",
    "gradient_accumulation_steps": "test_loss_and_gradient_are_those_of_the_masked_cross_entropy",
    "per_device_eval_batch_size": "test_evaluation_is_the_elbo_per_token_under_fixed_noise",
    "eval_strategy": "test_a_consistency_run_evaluates_where_it_can",
    "eval_on_start": "test_a_consistency_run_evaluates_where_it_can",
    "prediction_loss_only": "test_metrics_and_predictions_are_those_of_the_first_draw",
    "seed": "test_draws_of_iterations_are_uniform_over_the_ranges_and_depend_on_seed_and_step_alone",
    "max_grad_norm": "test_loss_and_gradient_are_those_of_the_masked_cross_entropy",
    CHECKPOINTING: "test_activation_checkpointing_recomputes_and_gives_the_same_weights",
    f"{CHECKPOINTING}_kwargs": "test_activation_checkpointing_recomputes_and_gives_the_same_weights",
    "torch_compile": "test_compiled_blocks_under_a_loop_of_any_length_train_alike",
    "load_best_model_at_end": "test_the_best_checkpoint_is_loaded_with_its_average",
    "remove_unused_columns": "test_unknown_columns_that_are_kept_are_refused",
    "train_sampling_strategy": "test_rows_grouped_by_length_are_evaluated_in_order",
    "neftune_noise_alpha": "test_noise_of_embeddings_is_drawn_in_training_alone",
    "accelerator_config": "test_what_a_trainer_cannot_honour_is_refused",
    "dataloader_num_workers": "test_rows_are_named_from_workers_too",
    "dataloader_pin_memory": "test_no_warning_is_left_that_a_user_cannot_act_on",
    "output_dir": "test_paths_and_names_are_taken",
    "resume_from_checkpoint": "test_training_goes_on_from_its_last_checkpoint_and_the_result_can_be_sampled",
}
# `Trainer` and the libraries it calls do all of these; nothing of ours is in their way.
TRANSFORMERS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules bf16 fp16 tf32 torch_compile_backend torch_compile_mode
    torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps eval_delay eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism data_seed use_cpu parallelism_config
    dataloader_drop_last dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order length_column_name ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    skip_memory_metrics do_train do_eval do_predict local_rank
"""
OLDER = ["gradient_checkpointing", "gradient_checkpointing_kwargs"] if RENAMED else []  # names of `CHECKPOINTING`
# Of our own configurations.
OWN = {
    MGMTrainingConfig: {
        "ema_decay": "test_ema_follows_its_formula_and_is_what_is_saved_evaluated_and_exported",
        "loss_weighting": "test_loss_and_gradient_are_those_of_the_masked_cross_entropy",
        "num_kept_iterations": "test_kept_iterations_give_the_same_weights_and_those_that_drew_more_run_again",
        "eval_num_draws": "test_the_stated_error_is_that_of_the_exact_value",
        "completion_only_loss": "test_prompts_train_as_ids_with_labels_in_every_trainer",
        "completion_multiple": "test_completions_are_filled_with_eos_up_to_a_multiple_or_the_models_length",
        "long_rows": "test_long_rows_are_refused_cut_or_dropped",
        "random_length_share": "test_cut_rows_keep_a_share_of_what_may_be_masked_and_train_by_the_formula",
        "data_description": "test_every_number_of_the_card_comes_from_the_model_the_run_or_a_file",
        "ignore_data_change": "test_options_that_may_change_are_named_and_data_only_if_asked",
    },
    ConsistencyConfig: {
        "consistency_loss": "test_loss_and_gradient_are_those_of_the_formula",
        "consistency_weight": "test_loss_and_gradient_are_those_of_the_formula",
        "consistency_warmup_steps": "test_loss_and_gradient_are_those_of_the_formula",
        "consistency_at": "test_loss_and_gradient_are_those_of_the_formula",
        "consistency_reduction": "test_loss_and_gradient_are_those_of_the_formula",
        "teacher": "test_loss_and_gradient_are_those_of_the_formula",
        "gap_range": "test_loss_and_gradient_are_those_of_the_formula",
        "consistency_positions": "test_loss_and_gradient_are_those_of_the_formula",
        "stop_at_perplexity_increase": "test_the_first_perplexity_and_the_stop_survive_an_interruption",
    },
    ConversionConfig: {
        "distillation_weight": "test_loss_and_gradient_are_those_of_the_formula",
        "distillation_warmup_steps": "test_the_weight_grows_linearly_and_stays",
        "distillation_temperature": "test_loss_and_gradient_are_those_of_the_formula",
        "gap_range": "test_loss_and_gradient_are_those_of_the_formula",
    },
    SDTTConfig: {
        "rounds": "test_rounds_and_steps_are_counted_and_the_teachers_step_grows",
        "steps_per_round": "test_rounds_and_steps_are_counted_and_the_teachers_step_grows",
        "teacher_steps": "test_loss_and_gradient_are_those_of_an_ancestral_teacher",
        "first_step_size": "test_rounds_and_steps_are_counted_and_the_teachers_step_grows",
    },
    ImageTokenizerConfig: {
        "restart_every": "test_codes_that_nothing_uses_are_moved_to_latents",
        "mirror": "test_pictures_are_mirrored_by_the_step",
        "ignore_data_change": "test_options_that_may_change_are_named_and_data_only_if_asked",
    },
}  # fmt: skip
OF_TRAINER = {
    "model": "test_paths_and_names_are_taken",
    "args": "test_arguments_of_another_class_are_refused",
    "data_collator": "test_what_a_collator_pads_is_no_data_and_its_labels_are_honoured",
    "train_dataset": "test_rows_of_any_type_and_with_other_columns_train_alike",
    "eval_dataset": "test_evaluation_is_the_elbo_per_token_under_fixed_noise",
    "processing_class": "test_a_tokenizer_that_does_not_fit_is_refused",
    "model_init": "test_arguments_of_another_class_are_refused",
    "compute_loss_func": "test_arguments_of_another_class_are_refused",
    "compute_metrics": "test_metrics_and_predictions_are_those_of_the_first_draw",
    "preprocess_logits_for_metrics": "test_metrics_and_predictions_are_those_of_the_first_draw",
    "callbacks": None,  # `Trainer`'s own business
    "optimizers": None,
    "optimizer_cls_and_kwargs": None,
}
TRAINERS = {
    MGMTrainer: MGMTrainingConfig,
    ConsistencyTrainer: ConsistencyConfig,
    ConversionTrainer: ConversionConfig,
    SDTTTrainer: SDTTConfig,
}


def test_every_argument_is_classified_and_its_test_exists():
    known = {field.name for field in fields(TrainingArguments)}
    refused, theirs = {*REFUSED, *REFUSED_BY_MGM}, [*TRANSFORMERS.split(), *OLDER]
    assert known == {*OURS, *theirs, *refused}
    assert len(known) == len(OURS) + len(theirs) + len(refused)
    for config, own in OWN.items():
        base = known if config.__mro__[1] is TrainingArguments else {f.name for f in fields(config.__mro__[1])}
        assert {field.name for field in fields(config)} - base == own.keys(), config
    assert {*inspect.signature(Trainer.__init__).parameters} - {"self"} == OF_TRAINER.keys()
    texts = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", texts, flags=re.MULTILINE))
    named = {*OURS.values(), *OF_TRAINER.values(), *(name for own in OWN.values() for name in own.values())}
    assert named - {None} - there == set()


REFUSED_VALUES = {
    "label_smoothing_factor": 0.1,
    "label_names": ["targets"],
    "average_tokens_across_devices": False,
    "use_cache": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "auto_find_batch_size": True,
    "debug": "underflow_overflow",
    "logging_nan_inf_filter": True,
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_BY_MGM])
def test_what_would_be_ignored_is_refused_by_name(tmp_path, name):
    for config in (MGMTrainingConfig, ImageTokenizerConfig):
        values = {"output_dir": str(tmp_path), "use_cpu": True, name: REFUSED_VALUES[name]}
        if config is ImageTokenizerConfig and name in REFUSED_BY_MGM:
            config(**values)
            continue
        refused(rf"`{name}`=.* cannot be honoured: .*Leave it out", config, **values)
    MGMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, label_names=["labels"])


REFUSED_OPTIONS = [
    (MGMTrainingConfig, {"eval_num_draws": 0}, "`eval_num_draws`=0 must be a whole number of draws, at least 1"),
    (MGMTrainingConfig, {"ema_decay": 1.5}, r"`ema_decay`=1\.5"),
    (MGMTrainingConfig, {"ema_decay": 1.0}, r"`ema_decay`=1\.0"),
    (MGMTrainingConfig, {"ema_decay": -0.1}, r"`ema_decay`=-0\.1"),
    (MGMTrainingConfig, {"long_rows": "keep"}, "`long_rows`='keep' must be one of"),
    (MGMTrainingConfig, {"completion_multiple": 0}, "`completion_multiple`=0"),
    (MGMTrainingConfig, {"random_length_share": 1.5}, r"`random_length_share`=1.5 must lie in \[0, 1\]"),
    (MGMTrainingConfig, {"optim": "schedule_free_adamw"}, "`optim`='schedule_free_adamw'.*`ema_decay=0`"),
    (ConsistencyConfig, {"consistency_loss": "mse"}, "`consistency_loss`='mse'.*hidden_mse"),
    (ConsistencyConfig, {"consistency_at": "first"}, "`consistency_at`='first'.*normed"),
    (ConsistencyConfig, {"consistency_reduction": "max"}, "`consistency_reduction`='max'.*mean"),
    (ConsistencyConfig, {"teacher": "other"}, "`teacher`='other'.*ema"),
    (ConsistencyConfig, {"consistency_weight": 0.0}, "`consistency_weight`=0.0"),
    (ConsistencyConfig, {"consistency_warmup_steps": 0.1}, "`consistency_warmup_steps`=0.1.*whole number"),
    (ConsistencyConfig, {"consistency_warmup_steps": -5}, "`consistency_warmup_steps`=-5"),
    (ConsistencyConfig, {"gap_range": [0.3, 0.05]}, r"`gap_range`=\[0.3, 0.05\]"),
    (ConsistencyConfig, {"gap_range": [0.0, 0.3]}, r"`gap_range`=\[0.0, 0.3\]"),
    (ConsistencyConfig, {"gap_range": [0.1, 1.0]}, r"`gap_range`=\[0.1, 1.0\]"),
    (ConsistencyConfig, {"gap_range": [0.1]}, r"`gap_range`=\[0.1\]"),
    (ConsistencyConfig, {"stop_at_perplexity_increase": -0.1}, "`stop_at_perplexity_increase`=-0.1"),
    (ConsistencyConfig, {"teacher": "ema", "ema_decay": 0}, "`teacher`='ema'.*`ema_decay`"),
    (
        ConsistencyConfig,
        {"load_best_model_at_end": True, "save_strategy": "steps"},
        "`load_best_model_at_end`.*one or the other",
    ),
    (
        ConsistencyConfig,
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        "`save_strategy`='best'.*one or the other",
    ),
    (ConsistencyConfig, {"consistency_loss": "logit_kl", "consistency_at": "normed"}, "`consistency_at`='normed'"),
    (ConsistencyConfig, {"consistency_loss": "logit_kl", "consistency_reduction": "sum"}, "`consistency_reduction`"),
    (ConversionConfig, {"distillation_weight": 0.0}, "`distillation_weight`=0.0"),
    (ConversionConfig, {"distillation_temperature": -1.0}, "`distillation_temperature`=-1.0"),
    (ConversionConfig, {"distillation_warmup_steps": 0.1}, "`distillation_warmup_steps`=0.1.*whole number"),
    (ConversionConfig, {"gap_range": [0.2, 0.1]}, r"`gap_range`=\[0.2, 0.1\]"),
    (SDTTConfig, {"loss_weighting": "uniform"}, "`loss_weighting`='uniform' would be ignored"),
    (SDTTConfig, {"rounds": 0}, "`rounds`=0"),
    (SDTTConfig, {"steps_per_round": 1.5}, "`steps_per_round`=1.5"),
    (SDTTConfig, {"teacher_steps": 0}, "`teacher_steps`=0"),
    (SDTTConfig, {"first_step_size": 0.0}, "`first_step_size`=0.0"),
    (SDTTConfig, {"first_step_size": 0.2, "rounds": 3}, "`rounds`=3.*1.6"),
]


@pytest.mark.parametrize(("config", "options", "message"), REFUSED_OPTIONS)
def test_values_that_are_not_allowed_or_without_a_meaning_are_refused(tmp_path, config, options, message):
    refused(message, config, output_dir=str(tmp_path), use_cpu=True, **options)


ON_THE_HEAD = LoraConfig(r=2, target_modules=["lm_head"])
STREAM = token_rows(8).to_iterable_dataset()
PROJECTED = {"trainer_class": ConsistencyTrainer, "consistency_loss": "projected_cosine"}
REFUSED_ARGUMENTS = [
    ({"accelerator_config": {"split_batches": True}}, "`accelerator_config` with `split_batches`=True"),
    ({"train_dataset": STREAM, "max_steps": -1, "num_train_epochs": 2}, "max_steps has to be specified"),
    ({"model": training_model(num_fixed_point_layers=0), "num_kept_iterations": 2}, "the model has no fixed-point"),
    ({"model": tiny_image_model(), "loss_weighting": "elbo"}, r"`loss_weighting`='elbo' must be one of \(None, 'unif"),
    *(
        ({"trainer_class": kind, "teacher": training_model(**{name: size})}, f"`teacher` has `{name}`={size}")
        for kind in (ConversionTrainer, SDTTTrainer)
        for name, size in (("vocab_size", 30), ("mask_token_id", MASK - 1))
    ),
    (  # what stands for no class in the student would be a class to the teacher
        {"trainer_class": ConversionTrainer, "model": tiny_image_model(), "teacher": tiny_image_model(num_classes=5)},
        "`teacher` has `num_classes`=5, but the model has 3",
    ),
    ({"trainer_class": SDTTTrainer, "peft_config": ON_THE_HEAD}, "`target_modules` names the head"),
    (
        {"trainer_class": ConsistencyTrainer, "consistency_loss": "logit_kl", "peft_config": ON_THE_HEAD},
        "`target_modules` names the head",
    ),
    ({**PROJECTED, "peft_config": LoraConfig(r=2)}, "projected_cosine"),
    ({**PROJECTED, "model": get_peft_model(training_model(), LoraConfig(r=2))}, "projected_cosine"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_ARGUMENTS)
def test_what_a_trainer_cannot_honour_is_refused(tmp_path, arguments, message):
    refused(message, make_trainer, tmp_path, **arguments)


# --- how long --------------------------------------------------------------------------------------------------------


def planned(trainer_class: type, folder: Path, **options) -> int:
    """Optimizer steps that a run of 20 rows plans, in batches of 4 of which two make a step."""
    teacher = {"teacher": training_model(1)} if trainer_class is ConversionTrainer else {}
    options |= {"train_dataset": token_rows(20), "gradient_accumulation_steps": 2, **teacher}
    trainer = make_trainer(folder, None, trainer_class, **options)
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


@pytest.mark.parametrize(("kind", "config"), TRAINERS.items())
def test_epochs_plan_a_run_and_two_lengths_are_refused(tmp_path, kind, config):
    default = {SDTTConfig: 70_000, ConsistencyConfig: 30_000, ConversionConfig: 40_000}.get(config, 1_000_000)
    own = {field.name: field.default for field in fields(config)}["max_steps"]
    assert planned(kind, tmp_path, max_steps=own) == default
    assert planned(kind, tmp_path, max_steps=own, num_train_epochs=3) == 9  # 5 batches make 3 steps
    assert planned(kind, tmp_path, max_steps=-1, num_train_epochs=0.5) == 2
    assert planned(kind, tmp_path, max_steps=7) == 7
    message = "`num_train_epochs`=3 and `max_steps`=7 plan two lengths"
    refused(message, planned, kind, tmp_path, max_steps=7, num_train_epochs=3)


def test_a_consistency_run_evaluates_where_it_can(tmp_path):
    args = ConsistencyConfig(output_dir=str(tmp_path), use_cpu=True)
    options = {"model": training_model(), "train_dataset": token_rows(4)}
    without = ConsistencyTrainer(args=args, **options)
    assert (without.args.eval_strategy, without.args.eval_on_start) == ("no", False)
    beside = ConsistencyTrainer(args=args, eval_dataset=token_rows(4), **options)  # the same arguments, unchanged
    assert (beside.args.eval_strategy, beside.args.eval_on_start) == ("steps", True)
    asked = ConsistencyConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps")
    refused("eval_dataset", ConsistencyTrainer, args=asked, **options)


# --- what is given to a trainer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer_class", [*TRAINERS, ImageTokenizerTrainer])
def test_arguments_of_another_class_are_refused(tmp_path, trainer_class):
    tokenizer = trainer_class is ImageTokenizerTrainer
    model = tiny_image_tokenizer() if tokenizer else training_model()
    needed = {"model": model, **({"teacher": training_model(1)} if trainer_class is ConversionTrainer else {})}
    config = ImageTokenizerConfig if tokenizer else TRAINERS[trainer_class]
    others = {TrainingArguments, *TRAINERS.values(), ImageTokenizerConfig} - {config}
    for other in others:
        args = other(output_dir=str(tmp_path), use_cpu=True)
        refused(rf"`args` is a {other.__name__}, but .* takes a {config.__name__}", trainer_class, args=args, **needed)
    args = config(output_dir=str(tmp_path), use_cpu=True)
    for name in ("model_init", "compute_loss_func"):
        refused(f"`{name}` cannot be honoured", trainer_class, args=args, **needed, **{name: lambda: None})
    refused("`model`=", trainer_class, args=args, **{**needed, "model": tmp_path / "none"})


def test_paths_and_names_are_taken(tmp_path):
    stored = training_model().bfloat16()  # which steps of training are too small for
    stored.save_pretrained(tmp_path / "model")
    for model in (tmp_path / "model", str(tmp_path / "model")):
        trainer = ConversionTrainer(model, ConversionConfig(output_dir=tmp_path / "out", use_cpu=True), teacher=model)
        assert trainer.args.output_dir == str(tmp_path / "out") and trainer.args.to_json_string()
        assert trainer.model is not trainer.teacher
        for name, expected in stored.float().named_parameters():
            assert trainer.model.get_parameter(name).dtype == torch.float32
            assert trainer.model.get_parameter(name).equal(expected) and trainer.teacher.get_parameter(name).equal(
                expected
            )
    with pytest.raises(ValueError, match="`teacher`=None: give a model"):
        ConversionTrainer(tmp_path / "model", ConversionConfig(output_dir=tmp_path, use_cpu=True))


@pytest.mark.parametrize(
    ("warmup", "schedule", "warned"),
    [
        (3, "linear", False), (0.5, "cosine", False), (4, "linear", True), (2500, "constant_with_warmup", True),
        (2500, "constant", False),
    ],
)  # fmt: skip
def test_a_run_that_ends_within_its_warmup_is_told(tmp_path, caplog, warmup, schedule, warned):
    trainer = make_trainer(tmp_path, max_steps=4, warmup_steps=warmup, lr_scheduler_type=schedule)
    with caplog.at_level("WARNING"):
        trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert (max(rates) < trainer.args.learning_rate) == warned
    assert (f"`warmup_steps`={warmup}, but the run has 4 steps" in caplog.text) == warned


@pytest.mark.parametrize(("warmup", "warned"), [(1, False), (2, True)])
def test_a_loss_whose_weight_is_never_reached_is_told(tmp_path, caplog, warmup, warned):
    options = {"max_steps": 1, "consistency_warmup_steps": warmup, "stop_at_perplexity_increase": None}
    trainer = make_trainer(tmp_path, None, ConsistencyTrainer, **options)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert (f"`consistency_warmup_steps`={warmup}, but the run has 1 steps" in caplog.text) == warned


@pytest.mark.parametrize(("steps", "told"), [(3, True), (4, False), (5, False)])
def test_a_run_that_ends_before_its_rounds_do_is_told(tmp_path, caplog, steps, told):
    options = {"rounds": 2, "steps_per_round": 2, "first_step_size": 0.1, "max_steps": steps}
    with caplog.at_level("WARNING"):
        make_trainer(tmp_path, None, SDTTTrainer, **options).train()
    assert (f"take 4 steps, but the run has {steps} and ends in round 2" in caplog.text) == told


def test_rows_grouped_by_length_are_evaluated_in_order(tmp_path):
    data = token_rows(12, ragged=True)
    plain = make_trainer(tmp_path, eval_dataset=data).evaluate()["eval_loss"]
    for rows in (data, list(data)):
        grouped = make_trainer(
            tmp_path, train_dataset=rows, eval_dataset=rows, train_sampling_strategy="group_by_length"
        )
        assert grouped.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)
        grouped.train()
    lengths = [len(ids) for ids in data["input_ids"]]
    batch = next(iter(grouped.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, max(lengths))  # the longest first


def test_noise_of_embeddings_is_drawn_in_training_alone(tmp_path):
    model, seen = training_model(), []
    model.pre_layers[0].register_forward_pre_hook(
        lambda module, args: seen.append((module.training, args[0].detach()))
    )
    embedded = []
    trainer = make_trainer(
        tmp_path, model, ConsistencyTrainer, neftune_noise_alpha=5.0, max_steps=1,
        stop_at_perplexity_increase=None, learning_rate=0.0,
    )  # fmt: skip
    model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer.train()
    assert [training for training, _ in seen] == [False, True]
    errors = [(h - model.embed_tokens.weight[ids]).abs().max() for (_, h), ids in zip(seen, embedded, strict=True)]
    assert errors[0] == 0 < errors[1] <= 5.0 / (LENGTH * 16) ** 0.5

    def sample(model):
        refused(r"noise of these would act: \['embed_tokens'\].*`model.eval\(\)`", model.generate, budget=24, seed=0)
        assert torch.equal(*(model.eval().generate(budget=24, seed=0) for _ in range(2)))

    trainer = make_trainer(tmp_path, neftune_noise_alpha=5.0, max_steps=2, callbacks=[CallOnce(2, sample)])
    trainer.train()
    assert torch.equal(*(trainer.model.generate(budget=24, seed=0) for _ in range(2)))  # the noise is gone
