# SPDX-License-Identifier: Apache-2.0
"""Costs of fake tensors against PyTorch's counter, real models' parameters and what operators really touch."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpmgm import FPMaskGITConfig, FPMaskGITModel, FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.analysis import planning
from fpmgm.analysis.cost import Call, count_parameters, trace_call
from fpmgm.analysis.measured import counted_flops
from fpmgm.analysis.planning import (
    SamplingStep,
    largest_masked_share,
    masked_shares,
    on_line,
    sampling_steps,
    sampling_work,
    seconds,
    sent_bytes,
    teacher_work,
    training_work,
)
from fpmgm.models.kinds import KINDS
from fpmgm.models.noise import arccos_ratio, diffusion_time
from fpmgm.trainers import ConsistencyTrainer, ConversionTrainer, SDTTTrainer
from fpmgm.trainers.batch import Noise

from ..testing_utils import (
    checkpoint_activations,
    refused,
    tiny_config,
    tiny_image_config,
    tiny_image_model,
    tiny_model,
)
from ..trainers.training_utils import token_rows


BATCH, LENGTH = 3, 8
MASKED = {0: 5, 2: 2}  # positions in a row: P = 7, Q = 5
MDLM = {"num_pre_layers": 3, "num_fixed_point_layers": 0, "num_post_layers": 0}


def flops(parts) -> float:
    return sum(work.flops for work in parts.values())


def call(model, iterations=(0, 0), backward=False, kept=None) -> None:
    """A call with labels and logits at the masked positions."""
    config = model.config
    shape = (BATCH, config.max_position_embeddings)
    labels = torch.full(shape, -100)
    for row, count in MASKED.items():
        labels[row, :count] = 1
    numbers = dict(zip(("num_no_grad_iterations", "num_iterations"), iterations, strict=True))
    numbers["num_kept_iterations"] = kept
    classes = {"class_labels": torch.arange(BATCH)} if config.model_type == "fpmaskgit" else {}
    output = model(
        torch.full(shape, config.mask_token_id),
        timesteps=torch.full((BATCH,), 0.5),
        labels=labels,
        logits_positions=(labels != -100).flatten().nonzero().squeeze(1),
        **(numbers if config.num_fixed_point_layers else {}),
        **classes,
    )
    if backward:
        output.loss.backward()


def computed(config, iterations=(0, 0), **options) -> float:
    names = ("num_no_grad_iterations", "num_iterations")
    given = dict(zip(names, iterations, strict=True))
    return flops(trace_call(config, Call(BATCH, config.max_position_embeddings, 7, 5, **given, **options)).work)


ARCHITECTURES = {
    "mdlm": ({**MDLM, "num_pre_layers": 12}, (0, 0)),
    "mlp": ({"dropout": 0.1}, (2, 3)),
    "linear": ({"input_injection": "linear"}, (1, 1)),
    "diagonal": ({"input_injection": "diagonal", "dropout": 0.1}, (0, 4)),
    "in_time": ({"time_conditioning": True}, (0, 1)),
    "mdlm_in_time": ({**MDLM, "time_conditioning": True, "dropout": 0.1}, (0, 0)),
    "deep": ({"num_pre_layers": 2, "num_fixed_point_layers": 2, "num_post_layers": 3}, (4, 2)),
    "no_pre": ({"num_pre_layers": 0, "intermediate_size": 24, "tie_word_embeddings": True}, (1, 2)),
    "no_post": ({"num_post_layers": 0, "conditioning_size": 6}, (1, 2)),
    "bare": ({"num_pre_layers": 0, "num_post_layers": 0, "input_injection": "linear"}, (0, 2)),
    "post_only": ({"num_pre_layers": 0, "num_fixed_point_layers": 0, "num_post_layers": 2}, (0, 0)),
}
IMAGE_ARCHITECTURES = {
    "maskgit": ({**MDLM, "num_pre_layers": 24}, (0, 0)),
    "fp_maskgit": ({"dropout": 0.1}, (2, 3)),
    "diagonal_registers": ({"input_injection": "diagonal", "num_register_tokens": 3}, (0, 4)),
    "heads_that_leave_a_rest": ({"num_attention_heads": 3, "tie_word_embeddings": False}, (1, 1)),
    "image_no_post": ({"num_post_layers": 0, "num_register_tokens": 0}, (1, 2)),
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *IMAGE_ARCHITECTURES])
def test_flops_are_those_that_pytorch_counts(name):
    overrides, iterations = {**ARCHITECTURES, **IMAGE_ARCHITECTURES}[name]
    model = tiny_model(**overrides) if name in ARCHITECTURES else tiny_image_model(**overrides)
    with torch.no_grad():
        assert counted_flops(lambda: call(model, iterations)) == computed(model.config, (0, sum(iterations)))
    model.train()
    assert counted_flops(lambda: call(model, iterations, True)) == computed(model.config, iterations, training=True)
    expected = computed(model.config, iterations, training=True, num_kept_iterations=1)
    assert counted_flops(lambda: call(model, iterations, True, kept=1)) == expected
    checkpoint_activations(model)
    expected = computed(model.config, iterations, training=True, checkpointing=True)
    assert counted_flops(lambda: call(model, iterations, True)) == expected


def test_what_the_counter_misses_on_a_cpu_is_attention_and_a_product_of_the_head():
    model = tiny_model().train()
    config = model.config
    known = counted_flops(lambda: call(model, (2, 3), True), formulas={})
    scores = 2 * BATCH * config.hidden_size * LENGTH  # FLOPs of a product of one query with all keys
    whole, pruned = LENGTH * scores, 5 * scores
    attention = 2 * (6 * whole + pruned) + 5 * (4 * whole + pruned)  # P and five iterations, post; P, three and post
    weight = 2 * 7 * config.hidden_size * config.vocab_size
    assert computed(config, (2, 3), training=True) == known + attention + weight
    model.zero_grad()

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            call(model, (2, 3))

    forward = computed(config, (0, 5)) + 2 * weight  # there the product is one that the counter sees
    assert counted_flops(under_autocast, formulas={}) == forward - 2 * (6 * whole + pruned)


def test_flops_do_not_depend_on_the_heads_chunks_and_no_counter_is_needed_for_written_out_attention(monkeypatch):
    model = tiny_model().train()
    monkeypatch.setattr(model.lm_head, "chunk_rows", 2)
    assert counted_flops(lambda: call(model, (1, 2), True)) == computed(model.config, (1, 2), training=True)
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        assert counted_flops(lambda: call(model, (1, 2)), formulas={}) == computed(model.config, (0, 3))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("overrides", [{}, MDLM, {"num_post_layers": 0}])
def test_flops_of_sampling_are_those_that_pytorch_counts(batch_size, overrides):
    model, seen = tiny_model(**overrides), []
    found = []

    def run():
        found.append(
            model.generate(
                batch_size=batch_size, budget=24, seed=3, return_dict_in_generate=True, callback=seen.append
            )
        )

    counted = counted_flops(run)
    steps = []
    for step in seen:  # idle ones do not run, nor rows that are written
        rows, n = step.revealed.sum(dim=1), found[0].iterations[step.step]
        ran = int((found[0].positions_computed[step.step] > 0).sum())
        alike = step.step == 0 and batch_size > 1  # one row is run, at the columns that any row reveals
        positions = int(step.revealed.any(dim=0).sum()) if alike else int(rows.sum())
        queries = positions if alike else int(rows.max())
        steps.append(SamplingStep(1 if alike else ran, positions, max(1, queries), int(rows.sum()), n))
    assert counted == pytest.approx(flops(sampling_work(model.config, steps, LENGTH)), rel=1e-12)


def test_expected_sampling_steps_add_up_to_the_sequences():
    steps = sampling_steps([6, 5, 4, 3], batch_size=2, length=64)
    assert sum(step.draws for step in steps) == 2 * 64
    assert [step.rows for step in steps] == [1, 2, 2, 2] and [step.iterations for step in steps] == [6, 5, 4, 3]
    assert steps[0].positions == 64 * (1 - 0.75**2)  # columns that one row or the other reveals
    assert all(step.positions / step.rows <= step.queries <= 64 for step in steps)
    given = sampling_steps([1, 1], batch_size=1, length=64, counts=[20, 44])
    assert [(step.positions, step.queries) for step in given] == [(20, 20), (44, 44)]


TRAINERS = {
    "consistency": (ConsistencyTrainer, {}),
    "conversion": (ConversionTrainer, MDLM),
    "sdtt": (SDTTTrainer, {}),
}


@pytest.mark.parametrize("method", TRAINERS)
def test_flops_of_the_trainers_with_a_teacher_are_those_that_pytorch_counts(method, tmp_path, monkeypatch):
    trainer_class, teacher = TRAINERS[method]
    model = tiny_model(no_grad_iterations=[1, 1], grad_iterations=[2, 2]).train()
    options = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    if method == "sdtt":  # a step so short that the teacher reveals nothing
        options |= {"first_step_size": 1e-12, "rounds": 1}
    given = {"teacher": tiny_model(**teacher)} if method == "conversion" else {}
    trainer = trainer_class(model, trainer_class.config_class(**options), train_dataset=token_rows(4), **given)
    uniforms = torch.full((BATCH, LENGTH), 0.99)
    for row, masked in MASKED.items():
        uniforms[row, :masked] = 0.01
    noise = Noise(
        key=(0,), places=torch.arange(BATCH), t=torch.full((BATCH,), 0.5), uniforms=uniforms,
        iterations={"num_no_grad_iterations": 1, "num_iterations": 2}, num_items=BATCH * LENGTH,
        num_sequences=BATCH,
    )  # fmt: skip

    def step():
        inputs = {"input_ids": torch.ones(BATCH, LENGTH, dtype=torch.long)}
        loss, _ = trainer.micro_batch_loss(model, inputs, noise)
        loss.backward()

    config = tiny_config(**teacher) if teacher else model.config
    monkeypatch.setattr(planning, "masked_positions", lambda *_: (7, 5))
    base = computed(model.config, (1, 2), training=True)
    assert counted_flops(step) == base + teacher_work(config, method, BATCH, LENGTH, 7 / 24).flops


def test_parameters_are_those_of_the_models():
    assert count_parameters(FPMDLMConfig(**{**MDLM, "num_pre_layers": 12}))["total"] == 169_627_218
    assert count_parameters(FPMDLMConfig())["total"] == 104_659_794
    assert count_parameters(FPMaskGITConfig())["total"] == 186_221_569
    text = [(FPMDLMForMaskedDiffusion, tiny_config(**overrides)) for overrides, _ in ARCHITECTURES.values()]
    images = [(FPMaskGITModel, tiny_image_config(**overrides)) for overrides, _ in IMAGE_ARCHITECTURES.values()]
    for model_class, config in text + images:
        with torch.device("meta"):
            model = model_class(config)
        assert count_parameters(config)["total"] == model.num_parameters()
    parts = count_parameters(FPMDLMConfig())
    assert parts.pop("total") == sum(parts.values())


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that operators read and write."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        free = function.is_view or any(name in str(function) for name in ("detach", "empty", "alias", "view", "split"))
        read = {name: value for name, value in (kwargs or {}).items() if name != "out"}
        tensors = [x for x in tree_leaves((args, read, output)) if torch.is_tensor(x)]
        self.total += 0 if free else sum(x.numel() * x.element_size() for x in tensors)
        return output


INJECTIONS = {"explicit": MDLM, "mlp": {}, "diagonal": {"input_injection": "diagonal"}}


@pytest.mark.parametrize("name", INJECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_model, tiny_image_model])
def test_bytes_are_those_that_operators_touch(name, dtype, make):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "dropout": 0.1}
    sizes |= {"max_position_embeddings": 64} if make is tiny_model else {"grid_size": 8, "num_post_layers": 4}
    check_bytes(make(**{**sizes, **INJECTIONS[name]}), dtype, rel=0.02)


def check_bytes(model, dtype: str, rel: float) -> None:
    """Compare both passes, and a forward pass alone, of half the positions of four sequences of 64."""
    classes = {"class_labels": torch.arange(4) % 3} if model.config.model_type == "fpmaskgit" else {}
    labels = torch.randint(7, (4, 64)).masked_fill(torch.arange(256).view(4, 64) % 2 == 0, -100)
    options = {**classes, "labels": labels, "logits_positions": (labels != -100).flatten().nonzero().squeeze(1)}
    if model.fixed_point is not None:
        options |= {"num_no_grad_iterations": 2, "num_iterations": 3}
    for training in (True, False):
        model.train(training)
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), torch.set_grad_enabled(training):
                loss = model(torch.full((4, 64), model.config.mask_token_id), **options).loss
            if training:
                loss.backward()
        given = {"num_no_grad_iterations": 2, "num_iterations": 3}
        parts = trace_call(model.config, Call(4, 64, 128, 32, training=training, dtype=dtype, **given)).work
        assert sum(work.bytes for work in parts.values()) == pytest.approx(traffic.total, rel=rel)


@pytest.mark.slow
def test_the_mean_step_is_that_of_all_draws():
    config = tiny_config(no_grad_iterations=[0, 1], grad_iterations=[2, 4])
    for kept in (None, 3):
        drawn = [(n, grad) for n in range(2) for grad in (2, 3, 4)]
        expected = sum(computed(config, pair, training=True, num_kept_iterations=kept) for pair in drawn) / len(drawn)
        parts = training_work(config, BATCH, LENGTH, 7 / 24, kept_iterations=kept)
        seven, five = (Call(BATCH, LENGTH, 7, q, training=True, num_iterations=2) for q in (7, 5))
        queries = flops(trace_call(config, seven).work) - flops(trace_call(config, five).work)
        assert flops(parts) == pytest.approx(expected + queries, rel=1e-12)


def test_time_is_bound_by_products_or_by_traffic_part_by_part():
    parts = training_work(tiny_config(), 4, 8, 0.5)
    expected = sum(max(work.flops / 100, work.bytes / 7) for work in parts.values())
    assert seconds(parts, 100, 7) == expected
    assert seconds({"optimizer": parts["optimizer"]}, 1, 10) == parts["optimizer"].bytes / 10


def test_a_step_is_on_the_line_of_two_others():
    config = tiny_config(no_grad_iterations=[0, 0], grad_iterations=[1, 1])

    def step(share: float) -> dict:
        return training_work(config, 8, LENGTH, share)

    found, expected = on_line(step, 0.5, 1 / 8, 0.75), step(0.5)
    for name in ("flops", "bytes"):
        assert [getattr(w, name) for w in found.values()] == pytest.approx(
            [getattr(w, name) for w in expected.values()]
        )


def test_the_rank_with_most_to_do_has_less_of_it_with_more_micro_batches():
    text, images = KINDS["fpmdlm"], KINDS["fpmaskgit"]
    assert [largest_masked_share(text, 1, n) for n in (1, 4)] == pytest.approx([0.5, 0.5], abs=1e-4)
    # By the times themselves: sequences of a rank are neighbours, (shift + j/n) mod 1.
    shifts, places = torch.linspace(0, 1, 129)[:-1], torch.arange(2400) / 2400
    times = ((shifts[:, None] + places) % 1).view(-1, 2, 3, 400).double()  # (shift, micro-batch, rank, sequence)
    for kind, shares in ((text, 0.999 * diffusion_time(times)), (images, arccos_ratio(times))):
        largest = shares.mean(dim=(1, 3)).amax(dim=1).mean().item()
        assert largest_masked_share(kind, 3, 2, shifts=128) == pytest.approx(largest, abs=2e-3)
    assert largest_masked_share(text, 8) > largest_masked_share(text, 8, 2) > largest_masked_share(text, 8, 8) > 0.5
    assert largest_masked_share(images, 1) == pytest.approx(2 / math.pi, abs=1e-5)
    thirds = (torch.linspace(0.9, 1.9, 60001)[:-1].double() % 1).view(3, -1)
    assert masked_shares(images, 3, 0.9).tolist() == pytest.approx(arccos_ratio(thirds).mean(dim=1).tolist(), abs=1e-3)


def test_sent_bytes():
    assert sent_bytes(100, "single", 1) == sent_bytes(100, "ddp", 1) == 0
    assert sent_bytes(100, "ddp", 4) == 2 * 0.75 * 400  # a ring: every GPU sends 3/4 of the gradients, and of the sums
    assert sent_bytes(100, "zero3", 4) == sent_bytes(100, "fsdp2", 4) == 3 * 0.75 * 200
    assert sent_bytes(100, "zero3", 4, micro_batches=5) == 5 * sent_bytes(100, "zero3", 4)


def test_a_method_that_does_not_exist_is_refused():
    refused(r"`method`='sft' must be one of", teacher_work, tiny_config(), "sft", 3, 8, 0.5)
