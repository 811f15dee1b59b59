# SPDX-License-Identifier: Apache-2.0
"""An optimizer step written from the formulas: each sequence alone and without padding, all of its logits at once.

Shapes: L length of a sequence, D hidden size, V vocabulary without the mask id, which is the last.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from fpmgm.models import head
from fpmgm.models.noise import stream_generator
from fpmgm.trainers import MGMTrainer

from ..testing_utils import tiny_image_model
from .training_utils import LENGTH, MASK, image_rows, token_rows, training_model, weights


SEED = 7  # not the configuration's default


@dataclass(frozen=True)
class Kind:
    """A kind of model: tiny ones and rows, their length and mask id; t of a uniform, P(masked) at t, weight at t; and
    which positions of a row (L,) may be masked."""

    model: Callable[..., nn.Module]
    rows: Callable[[int], Dataset]
    length: int
    mask: int
    time: Callable[[float], float]
    probability: Callable[[float], float]
    weight: Callable[[float], float]
    scored: Callable[[torch.Tensor], torch.Tensor] = lambda ids: torch.ones(len(ids), dtype=torch.bool)


TEXT = Kind(
    model=training_model,
    rows=lambda count: token_rows(count, ragged=True, seed=1),
    length=LENGTH,
    mask=MASK,
    time=lambda u: 1e-3 + (1 - 1e-3) * u,
    probability=lambda t: 0.999 * t,
    weight=lambda t: 1 / t,
)
IMAGES = Kind(
    model=lambda seed=0, scale=0.1, **overrides: tiny_image_model(seed, scale, **overrides),
    rows=lambda count: image_rows(count, seed=1),
    length=9,
    mask=7,
    time=lambda u: math.acos(u) / (math.pi / 2),
    probability=lambda t: t,
    weight=lambda t: math.pi / 2,
)


def after_prompt(ids) -> torch.Tensor:
    """Which positions of a row are scored: a prompt whose length its first token tells is not; of some, nothing is."""
    return torch.arange(len(ids)) >= (LENGTH if ids[0] == 3 else int(ids[0]) % 5)


def prompted_rows(count: int) -> Dataset:
    """Ragged rows with labels of -100 at their prompts; of the second row, everywhere."""
    data = TEXT.rows(count)["input_ids"]
    data = [[3, *ids[1:]] if k == 1 else ids for k, ids in enumerate(data)]
    labels = [torch.tensor(ids).masked_fill(~after_prompt(ids), -100).tolist() for ids in data]
    return Dataset.from_dict({"input_ids": data, "labels": labels})


PROMPTED = replace(TEXT, rows=prompted_rows, scored=after_prompt)


def kind_of(name: str) -> Kind:
    """The kind that the name of a case begins with."""
    return {"images": IMAGES, "prompted": PROMPTED}.get(name.split("_")[0], TEXT)


# --- what a run did --------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """An optimizer step: the weights before it, its gradient, and the rows, classes (`None` of text) and iterations
    that the model saw."""

    weights: dict[str, torch.Tensor]
    rows: list[torch.Tensor] = field(default_factory=list)
    classes: list[int | None] = field(default_factory=list)
    iterations: dict[str, int] = field(default_factory=dict)
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)


class RecordSteps(TrainerCallback):
    """Keeps each optimizer step of a run of a trainer that it watches, with its rows in the order of the data."""

    def __init__(self):
        self.steps: list[Step] = []

    def watch(self, trainer: MGMTrainer) -> MGMTrainer:
        """`trainer`, which from now on tells of every micro-batch."""
        loss = trainer.micro_batch_loss
        trainer.micro_batch_loss = lambda model, batch, noise: (self._record(batch, noise), loss(model, batch, noise))[
            1
        ]
        trainer.add_callback(self)
        return trainer

    def _record(self, batch, noise):
        step, clean = self.steps[-1], batch["input_ids"]
        lengths = batch.get("attention_mask", torch.ones_like(clean)).sum(dim=1)
        step.rows += [ids[:length] for ids, length in zip(clean, lengths.tolist(), strict=True)]
        step.classes += batch["class_labels"].tolist() if "class_labels" in batch else [None] * len(clean)
        step.iterations = {name: noise.iterations[name] for name in ("num_no_grad_iterations", "num_iterations")}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append(Step(weights(model)))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps[-1].gradient = {name: p.grad.clone() for name, p in model.named_parameters()}


def recorded(make: Callable, folder: Path, kind: Kind, model: nn.Module, batch: int, **options) -> tuple:
    """The trainer that `make` gives, run on seven rows by plain gradient descent, and its steps: on four rows, then
    on three, in micro-batches of `batch` rows and with the logits of three positions at a time."""
    run = {
        "train_dataset": kind.rows(7), "per_device_train_batch_size": batch, "learning_rate": 0.05, "optim": "sgd",
        "gradient_accumulation_steps": 4 // batch, "max_grad_norm": 0.0, "max_steps": 2, "seed": SEED, **options,
    }  # fmt: skip
    record = RecordSteps()
    with patch.object(head, "chunk_rows", lambda *_: 3):
        trainer = record.watch(make(folder, model, **run))
        trainer.train()
    assert [len(step.rows) for step in record.steps] == [4, 3] * (len(record.steps) // 2)
    return trainer, record.steps


def with_weights(model: nn.Module, values: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of `model` that holds `values`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


def averages(history: list[dict[str, torch.Tensor]], decay: float) -> list[dict[str, torch.Tensor]]:
    """The average of the weights before each step: s ← ds + (1 − d)w with d = min(`decay`, (1 + n)/(10 + n))."""
    result = [history[0]]
    for n, current in enumerate(history[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        result.append({name: d * old + (1 - d) * current[name] for name, old in result[-1].items()})
    return result


def assert_gradient(model: nn.Module, loss: torch.Tensor, gradient: dict, tolerance: float = 1e-6) -> None:
    """Assert that `gradient` is that of `loss` for every parameter of `model`, up to a share of its largest entry."""
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert gradient.keys() == expected.keys()
    wrong = {name: (gradient[name] - g).abs().max() / g.abs().max().clamp(min=1e-12) for name, g in expected.items()}
    assert {name: error.item() for name, error in wrong.items() if not error <= tolerance} == {}


# --- noise -----------------------------------------------------------------------------------------------------------


class Noisy(NamedTuple):
    """A sequence `ids` (L,), hidden at `masked` (L,) at time `t`, and at a part of it at the earlier `t_clean`."""

    kind: Kind
    place: int
    ids: torch.Tensor
    label: int | None
    uniforms: torch.Tensor
    t: float
    masked: torch.Tensor
    t_clean: float
    still_masked: torch.Tensor


def corrupt(step: Step, number: int, gap_range: tuple[float, float] = (0.05, 0.30), kind: Kind = TEXT) -> list[Noisy]:
    """The global batch of optimizer step `number`."""
    key, result = (SEED, "train", number), []
    shift = torch.rand((), generator=stream_generator(*key, "shift")).item()
    for j, (ids, label) in enumerate(zip(step.rows, step.classes, strict=True)):
        t = kind.time((shift + j / len(step.rows)) % 1)
        uniforms = torch.rand(kind.length, generator=stream_generator(*key, j))[: len(ids)]
        gap = torch.rand((), generator=stream_generator(*key, j, "gap")).item()
        t_clean = max(t - gap_range[0] - (gap_range[1] - gap_range[0]) * gap, 1e-3)
        scored = kind.scored(ids)
        masked, still_masked = (scored & (uniforms < kind.probability(time)) for time in (t, t_clean))
        if masked.any() and masked.equal(still_masked):
            still_masked[max((u, i) for i, u in enumerate(uniforms.tolist()) if masked[i])[1]] = False
        result.append(Noisy(kind, j, ids, label, uniforms, t, masked, t_clean, still_masked))
    return result


# --- what a model says -----------------------------------------------------------------------------------------------


class Belief(NamedTuple):
    """Logits (L, V) and hidden states (L, D), before and after the final norm."""

    logits: torch.Tensor
    last: torch.Tensor
    normed: torch.Tensor


def believe(model: nn.Module, noisy: Noisy, ids: torch.Tensor, t: float, **iterations: int) -> Belief:
    """What `model` says of a sequence when it sees `ids` (L,) at time `t`, in evaluation mode."""
    labels = {} if noisy.label is None else {"class_labels": torch.tensor([noisy.label])}
    output = model.eval()(ids[None], timesteps=torch.tensor([t]), **labels, **iterations)
    return Belief(output.logits[0, :, : noisy.kind.mask], output.last_hidden_state[0], output.normed_hidden_state[0])


def of_student(model: nn.Module, noisy: list[Noisy], step: Step) -> list[Belief]:
    """With gradient, at the noisier states."""
    return [believe(model, n, n.ids.masked_fill(n.masked, n.kind.mask), n.t, **step.iterations) for n in noisy]


@torch.no_grad()
def of_teacher(model: nn.Module, noisy: list[Noisy], **iterations: int) -> list[Belief]:
    """Without gradient, at the cleaner states."""
    return [believe(model, n, n.ids.masked_fill(n.still_masked, n.kind.mask), n.t_clean, **iterations) for n in noisy]


# --- losses ----------------------------------------------------------------------------------------------------------


def cross_entropy(beliefs: list[Belief], noisy: list[Noisy], weight: float | None = None) -> torch.Tensor:
    """Σ over masked positions of w·(−log p(x_i)), per scored position of the batch; w is the kind's, or `weight`."""
    total = 0.0
    for belief, n in zip(beliefs, noisy, strict=True):
        log_p = belief.logits.log_softmax(dim=-1)[torch.arange(len(n.ids)), n.ids]  # (L,)
        total = total - log_p[n.masked].sum() * (n.kind.weight(n.t) if weight is None else weight)
    return total / sum(n.kind.scored(n.ids).sum() for n in noisy)


def elbo(model: nn.Module, kind: Kind, rows: Dataset, seed: int, draw: int = 0) -> float:
    """What evaluation estimates: Σ w(t)·(−log p(x_i)) over the masked positions, per position that may be masked."""
    key, noisy = (seed, "eval", draw), []
    shift = torch.rand((), generator=stream_generator(seed, "eval", 0, "shift")).item() + draw * (math.sqrt(2) - 1)
    for j, row in enumerate(rows):
        ids, t = torch.tensor(row["input_ids"]), kind.time(1 - abs(2 * ((shift + j * 0.6180339887498949) % 1) - 1))
        uniforms = torch.rand(kind.length, generator=stream_generator(*key, j))[: len(ids)]
        masked = kind.scored(ids) & (uniforms < kind.probability(t))
        noisy.append(Noisy(kind, j, ids, row.get("class_labels"), uniforms, t, masked, t, masked))
    return cross_entropy(of_teacher(model, noisy), noisy).item()


def mean_of_means(
    distances: list[torch.Tensor], noisy: list[Noisy], where: Callable[[Noisy], torch.Tensor] = lambda n: n.masked
) -> torch.Tensor:
    """The mean of `distances` (L,) over a sequence's positions `where`, 0 where there is none, then over sequences."""
    places = [where(n) for n in noisy]
    means = [d[p].mean() if p.any() else d.sum() * 0 for d, p in zip(distances, places, strict=True)]
    return torch.stack(means).mean()


def divergence(logits: torch.Tensor, other: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p ‖ q) of softmax(`logits`/τ) from softmax(`other`/τ), (L,)."""
    p, q = (logits / temperature).softmax(dim=-1), (other / temperature).softmax(dim=-1)
    return (p * (p / q).log()).sum(dim=-1)
