# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through time against an ancestral teacher written out position by position."""

import pytest
import torch
from peft import LoraConfig

from fpmgm.models.noise import stream_generator
from fpmgm.trainers import SDTTTrainer

from .reference import (
    SEED,
    Noisy,
    assert_gradient,
    averages,
    believe,
    corrupt,
    divergence,
    kind_of,
    mean_of_means,
    of_student,
    recorded,
    with_weights,
)
from .training_utils import LENGTH, MASK, CallOnce, make_trainer, training_model, weights


EXPLICIT = {"num_pre_layers": 2, "num_fixed_point_layers": 0, "num_post_layers": 1}


def sdtt_trainer(folder, model=None, **arguments) -> SDTTTrainer:
    defaults = {"rounds": 2, "steps_per_round": 2, "first_step_size": 0.2}
    return make_trainer(folder, model, SDTTTrainer, **{**defaults, **arguments})


# --- the loss --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ancestral_logits(teacher, noisy: Noisy, step: int, step_size: float, teacher_steps: int) -> tuple:
    """(L, V) logits that each masked position had when it was revealed, or at the end, and how many were before."""
    kind, stream = noisy.kind, stream_generator(SEED, "train", step, noisy.place, "draw")
    draws = torch.rand(kind.length, generator=stream, dtype=torch.float64).tolist()
    tokens = noisy.ids.masked_fill(noisy.masked, kind.mask)
    waiting = noisy.masked.nonzero().flatten().tolist()
    result = torch.zeros(len(tokens), kind.mask, dtype=torch.float64)
    early = 0
    for k in range(teacher_steps):
        t, after = (max(noisy.t - i * step_size, 0.0) for i in (k, k + 1))
        logits, seen = believe(teacher, noisy, tokens, t).logits, tokens.clone()
        for i in list(waiting):
            result[i] = logits[i]
            # masked at t where its uniform is under P(t); shown from the first time on whose P is not above it
            if noisy.uniforms[i].item() >= kind.probability(after):
                cumulative = logits[i].softmax(dim=-1).cumsum(dim=-1).tolist()
                seen[i] = next(token for token, share in enumerate(cumulative) if share > draws[i])
                waiting.remove(i)
                early += k < teacher_steps - 1
        tokens = seen
    return result, early


# Options, the model, the teacher of the first round (none: the model), sequences in a micro-batch.
LOSSES = {
    "two_steps": ({}, EXPLICIT, None, 2),
    "three_steps": ({"teacher_steps": 3, "first_step_size": 0.1}, {}, None, 4),
    "in_time": ({}, {"time_conditioning": True}, None, 1),
    "given_teacher": ({}, {}, EXPLICIT, 2),
    "images": ({"teacher_steps": 3, "first_step_size": 0.1}, {"class_dropout": 0.4}, None, 2),
    "images_given_teacher": ({}, {}, EXPLICIT, 1),
    "prompted": ({}, {}, None, 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_an_ancestral_teacher(tmp_path, name):
    options, architecture, of_teacher, batch = LOSSES[name]
    kind = kind_of(name)
    model = kind.model(0, 0.2, **architecture).double()
    given = None if of_teacher is None else kind.model(1, 0.3, **of_teacher).double()
    first = with_weights(model, weights(model)) if given is None else given
    before = weights(first)
    trainer, steps = recorded(
        sdtt_trainer, tmp_path, kind, model, batch, teacher=given, max_steps=-1, ema_decay=0.5, **options
    )
    assert len(steps) == 4
    assert all(torch.equal(parameter, before[name]) for name, parameter in first.named_parameters())
    average = averages([step.weights for step in steps], decay=0.5)
    revealed = 0
    for k, step in enumerate(steps):
        teacher = first if k < 2 else with_weights(model, average[2])
        number = options.get("teacher_steps", 2)
        size = options.get("first_step_size", 0.2) * (1 if k < 2 else number)
        student, noisy = with_weights(model, step.weights), corrupt(step, k, kind=kind)
        targets, early = zip(*(ancestral_logits(teacher, n, k, size, number) for n in noisy), strict=True)
        beliefs = of_student(student, noisy, step)
        distances = [divergence(b.logits, t) for b, t in zip(beliefs, targets, strict=True)]  # KL(student ‖ target)
        loss = mean_of_means(distances, noisy)
        assert_gradient(student, loss, step.gradient, tolerance=1e-6 if k < 2 else 2e-5)  # the average is in float32
        line = trainer.state.log_history[k]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["divergence"] == pytest.approx(loss.item(), rel=1e-5)
        revealed += sum(early)
    assert revealed > 10


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_and_steps_are_counted_and_the_teachers_step_grows(tmp_path):
    trainer = sdtt_trainer(tmp_path, rounds=3, steps_per_round=2, first_step_size=0.1, max_steps=-1)
    assert trainer.args.max_steps == 6
    sizes = []
    for trainer.state.global_step in range(8):
        sizes.append(trainer.step_size)
    assert sizes == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.4, 0.4])
    tripled = sdtt_trainer(tmp_path, teacher_steps=3, first_step_size=0.1, max_steps=5)
    tripled.state.global_step = 2
    assert tripled.step_size == pytest.approx(0.3)
    assert tripled.args.max_steps == 5


@pytest.mark.parametrize("ema_decay", [0.5, None])
def test_the_next_teacher_is_the_average_with_what_wraps_it(tmp_path, ema_decay):
    ids, seen = torch.randint(0, MASK + 1, (2, LENGTH)), []

    def compare(model):
        with trainer._averaged():
            expected = model.eval()(ids).logits
        seen.extend([trainer.teacher.eval()(ids).logits, expected, model(ids).logits])

    trainer = sdtt_trainer(
        tmp_path, training_model(0, 0.3), peft_config=LoraConfig(r=2), callbacks=[CallOnce(3, compare)],
        ema_decay=ema_decay, max_steps=3, learning_rate=0.1,
    )  # fmt: skip
    trainer.train()
    teacher, average, raw = seen
    assert torch.equal(teacher, average)
    assert torch.equal(teacher, raw) == (ema_decay is None)
