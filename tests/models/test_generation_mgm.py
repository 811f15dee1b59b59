# SPDX-License-Identifier: Apache-2.0
"""`generate` against exact distributions, a naive sampler written out, counted blocks, and every bad input."""

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fpmgm import MGMGenerationConfig, MGMGenerationMixin, MGMOutput
from fpmgm.models import reveal as reveal_module
from fpmgm.models.block_fpmdlm import FPMDLMBlock
from fpmgm.models.noise import stream_generator
from tests.models.helpers import count_calls, lively_model
from tests.models.reference_mdlm import reference_forward
from tests.testing_utils import refused, stacks, tiny_model


MASK = 10  # of tiny_config
REUSES = ("none", "full", "3sr")


def prompts() -> torch.Tensor:
    """Three rows of length 8, each with other positions to write."""
    M = MASK
    return torch.tensor([[1, 2, M, M, M, 6, M, M], [M] * 8, [M, M, M, M, 0, M, M, 9]])


def gamma(reuse, previous, now, mask_token_id, real, unchanged=1.0, masked=(0.75, 0.9), changed=0.2) -> torch.Tensor:
    """Algorithm 1, line 16, position by position, (B, L, 1)."""
    shares = torch.ones(now.shape, dtype=torch.float64)
    for row, i in itertools.product(*map(range, now.shape)) if reuse == "3sr" else ():
        visible = [token != mask_token_id for token in now[row][real[row].bool()].tolist()]
        if previous[row, i] != now[row, i]:
            shares[row, i] = changed
        elif now[row, i] == mask_token_id:
            shares[row, i] = masked[0] + (masked[1] - masked[0]) * sum(visible) / len(visible)
        else:
            shares[row, i] = unchanged
    return shares[..., None]


def naive_generate(model, tokens, attention_mask, uniforms, iterations, reuse, **gammas):
    """The ancestral sampler without any saving: logits everywhere, and at each step the choice what to reveal."""
    config, weights = model.config, model.state_dict()
    real = torch.ones_like(tokens) if attention_mask is None else attention_mask
    reveal_uniforms, token_uniforms = uniforms
    state = previous = None
    for step, count in enumerate(iterations):
        time, next_time = (1 - i * (1 - 1e-5) / len(iterations) for i in (step, step + 1))
        share = 1.0 if state is None else gamma(reuse, previous, tokens, config.mask_token_id, real, **gammas)
        output = reference_forward(
            config, weights, tokens, timesteps=torch.full((len(tokens),), time), attention_mask=real,
            iterations=count, previous_state=state, previous_share=share,
        )  # fmt: skip
        logits = output.logits.clone()
        logits[..., config.mask_token_id] = -torch.inf
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        drawn = (cumulative <= token_uniforms[..., None] * cumulative[..., -1:]).sum(dim=-1)
        wanted = (tokens == config.mask_token_id) & real.bool()
        # Masked since the start with probability P(s)/P(1) = s; the last step leaves nothing.
        revealed = wanted & ((reveal_uniforms >= next_time) | (step == len(iterations) - 1))
        previous, tokens = tokens, torch.where(revealed, drawn, tokens)
        state = output.state if reuse != "none" else None
    return tokens


class KnownDistribution(MGMGenerationMixin, nn.Module):
    """A denoiser without weights that gives the same logits at every position and records what it is asked."""

    device = torch.device("cpu")

    def __init__(self, logits: list[float], mask_token_id: int, length: int):
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=len(logits), mask_token_id=mask_token_id, max_position_embeddings=length,
            num_pre_layers=1, num_fixed_point_layers=0, num_post_layers=0, num_classes=0, num_register_tokens=0,
            can_reuse=False,
        )  # fmt: skip
        self.generation_config = MGMGenerationConfig()
        self.logits, self.calls = torch.tensor(logits), []

    def forward(self, input_ids, timesteps, logits_positions, **kwargs):
        self.calls.append((input_ids, timesteps, logits_positions))
        return MGMOutput(logits=self.logits.expand(len(logits_positions), -1), block_evaluations=1)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.5, 0.3, 0, 0.2]),
        ({"temperature": 0.5}, [25 / 38, 9 / 38, 0, 4 / 38]),
        ({"top_k": 2}, [5 / 8, 3 / 8, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_known_logits_give_known_marginals_and_independent_positions(arguments, expected):
    p = torch.tensor([0.5, 0.3, 50.0, 0.2])  # the mask (2) would be the likeliest by far
    model = KnownDistribution(p.log().tolist(), mask_token_id=2, length=2)
    rows = 20_000
    tokens = model.generate(batch_size=rows, num_steps=3, iterations=0, **arguments)
    pairs = (4 * tokens[:, 0] + tokens[:, 1]).bincount(minlength=16) / rows
    exact = torch.outer(torch.tensor(expected), torch.tensor(expected)).flatten()
    assert ((pairs - exact).abs() <= 4 * (exact * (1 - exact) / rows).sqrt()).all()


def test_each_wanted_position_is_asked_for_once_and_the_time_runs_down():
    model = KnownDistribution([0.0, 0.0, 0.0], mask_token_id=2, length=50)
    ids = torch.full((4, 50), 2)
    ids[:, ::5] = 1
    model.generate(ids, num_steps=7, iterations=0)
    asked = torch.cat([positions for _, _, positions in model.calls])
    assert sorted(asked.tolist()) == (ids == 2).flatten().nonzero().flatten().tolist()
    for step, (seen, times, positions) in enumerate(model.calls):
        assert seen.flatten()[positions].eq(2).all()
        assert times.tolist() == pytest.approx([1 - step * (1 - 1e-5) / 7] * 4)


FAR_APART = {"masked": (0.1, 0.4), "changed": 0.0}  # from "full"


def exact_distribution(model, prompt: torch.Tensor, iterations: list[int], reuse: str) -> torch.Tensor:
    """Probability of each of the 2^2 ways to fill two masks in two steps, by enumeration of what is revealed when."""
    config, weights = model.config, model.state_dict()
    masks = (prompt[0] == config.mask_token_id).nonzero().flatten().tolist()
    middle = 0.5 * (1 + 1e-5)  # the time of the second step: masked there with probability `middle`
    first = reference_forward(config, weights, prompt, timesteps=torch.ones(1), iterations=iterations[0])
    p_first = first.logits[0, :, :2].softmax(dim=-1)
    exact = torch.zeros(2, 2, dtype=torch.float64)
    for early in itertools.product([False, True], repeat=2):
        for filled in itertools.product([0, 1], repeat=2):
            between = prompt.clone()
            for position, is_early, token in zip(masks, early, filled, strict=True):
                between[0, position] = token if is_early else config.mask_token_id
            start = {}
            if reuse != "none":
                share = gamma(reuse, prompt, between, config.mask_token_id, torch.ones(prompt.shape), **FAR_APART)
                start = {"previous_state": first.state, "previous_share": share}
            second = reference_forward(
                config, weights, between, timesteps=torch.tensor([middle]), iterations=iterations[1], **start
            )
            p_second = second.logits[0, :, :2].softmax(dim=-1)
            p = 1.0
            for position, is_early, token in zip(masks, early, filled, strict=True):
                p *= (1 - middle) * p_first[position, token] if is_early else middle * p_second[position, token]
            exact[filled] += p
    return exact.flatten()


@pytest.mark.parametrize("reuse", REUSES)
def test_samples_follow_the_exactly_enumerated_distribution(reuse):
    model = lively_model(seed=2, vocab_size=3, mask_token_id=2, time_conditioning=True)
    prompt, iterations, rows = torch.tensor([[2, 1, 2]]), [2, 1], 20_000
    gammas = {f"gamma_{name}": value for name, value in FAR_APART.items()} if reuse == "3sr" else {}
    tokens = model.generate(prompt, batch_size=rows, num_steps=2, iterations=iterations, reuse=reuse, **gammas)
    assert tokens[:, 1].eq(1).all()
    found = (2 * tokens[:, 0] + tokens[:, 2]).bincount(minlength=4) / rows

    def deviation(other: str) -> float:
        """Largest distance of a frequency from its exact probability, in standard deviations."""
        exact = exact_distribution(model, prompt, iterations, other)
        assert exact.sum().item() == pytest.approx(1)
        return float(((found - exact).abs() / (exact * (1 - exact) / rows).sqrt()).max())

    assert deviation(reuse) < 4
    assert all(deviation(other) > 8 for other in REUSES if other != reuse)  # the test can tell them apart


@pytest.mark.parametrize(
    "overrides", [{"time_conditioning": True}, {"input_injection": "mlp"}, {"num_fixed_point_layers": 0}], ids=str
)
@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_equal_those_of_the_naive_sampler(reuse, overrides, padded, monkeypatch):
    model, ids = lively_model(**overrides), prompts().repeat(3, 1)
    uniforms = torch.rand(2, 9, 8, dtype=torch.float64)
    monkeypatch.setattr(reveal_module, "draw_uniforms", lambda *args, **kwargs: uniforms)
    attention_mask, gammas = None, {}
    if padded:
        attention_mask = torch.ones(9, 8, dtype=torch.long)
        attention_mask[::3, :2], attention_mask[1::3, 3:] = 0, 0
    if padded and reuse == "3sr":  # shares far from the defaults, among which small mistakes could hide
        gammas = {"unchanged": 0.6, "masked": [0.0, 1.0], "changed": 0.4}
    iterations = [3, 1, 2, 1, 1] if model.fixed_point is not None else [0] * 5
    arguments = {f"gamma_{name}": value for name, value in gammas.items()}
    tokens = model.generate(ids, attention_mask=attention_mask, iterations=iterations, reuse=reuse, **arguments)
    expected = naive_generate(model, ids, attention_mask, uniforms, iterations, reuse, **gammas)
    assert tokens.tolist() == expected.tolist()


# --- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", REUSES)
def test_rows_with_seeds_equal_the_rows_run_alone(reuse):
    model, seeds = lively_model(), [11, 5, 11, 8]
    call = {"budget": 24, "reuse": reuse}
    batch = model.generate(batch_size=4, seed=seeds, **call)
    for row, seed in enumerate(seeds):
        assert torch.equal(batch[row : row + 1], model.generate(seed=[seed], **call))
        assert torch.equal(batch[row : row + 1], model.generate(seed=seed, **call))
    assert len(batch.unique(dim=0)) == 3


def test_one_seed_gives_row_k_its_own_stream():
    model = lively_model()
    batch = model.generate(batch_size=5, seed=3, budget=24)
    assert torch.equal(batch[:2], model.generate(batch_size=2, seed=3, budget=24))
    assert len(batch.unique(dim=0)) == 5
    before = torch.get_rng_state()
    assert not torch.equal(model.generate(batch_size=5, seed=2, budget=24), batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_randomness_without_a_seed():
    model, call = lively_model(), {"batch_size": 3, "budget": 24}
    torch.manual_seed(1)
    first, second = model.generate(**call), model.generate(**call)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**call), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    given = [model.generate(**call, generator=stream_generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(given[0], given[1]) and not torch.equal(given[0], given[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_zero_is_the_argmax_whatever_the_seed():
    model = lively_model()
    logits = model(prompts(), num_iterations=4).logits
    logits[..., MASK] = -torch.inf
    expected = torch.where(prompts() == MASK, logits.argmax(dim=-1), prompts())
    for seed in (0, 1, None):
        assert torch.equal(model.generate(prompts(), num_steps=1, iterations=4, temperature=0, seed=seed), expected)


# --- prompts and padding ---------------------------------------------------------------------------------------------


def test_given_tokens_are_kept_and_everything_else_is_written():
    model, ids = lively_model(), prompts()
    tokens = model.generate(ids, budget=30, seed=0)
    assert torch.equal(tokens[ids != MASK], ids[ids != MASK]) and tokens.ne(MASK).all()
    assert torch.equal(ids, prompts())  # the caller's tensor is left alone
    many = model.generate(ids[:1], batch_size=3, seed=[0, 1, 0], budget=30)
    assert torch.equal(many[0], many[2]) and not torch.equal(many[0], many[1])
    assert many[:, [0, 1, 5]].tolist() == [[1, 2, 6]] * 3


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_equal_each_prompt_run_alone_without_padding(side, reuse):
    model, seeds = lively_model(), [4, 5, 6]
    rows = [prompts()[0, :5], prompts()[1], prompts()[2, :3]]
    ids, attention_mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for k, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(8 - len(row), 8)
        ids[k, place], attention_mask[k, place] = row, 1
    together = model.generate(ids, attention_mask=attention_mask, seed=seeds, budget=30, reuse=reuse)
    for k, row in enumerate(rows):
        alone = model.generate(row[None], seed=seeds[k : k + 1], budget=30, reuse=reuse)
        assert together[k][attention_mask[k].bool()].tolist() == alone[0].tolist(), k


# --- budget, last step, callback, output -----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 1, 1), (2, 3, 1), (3, 0, 0)])
@pytest.mark.parametrize(
    "arguments",
    [
        {"budget": 37},
        {"budget": 50, "num_steps": 4, "allocation": "increasing"},
        {"num_steps": 12, "iterations": 2},
        {"budget": 60, "allocation": [3, 1, 2]},
    ],
    ids=str,
)
def test_block_evaluations_are_the_blocks_that_ran(layers, arguments):
    model = tiny_model(**stacks(*layers))
    calls = count_calls(model, FPMDLMBlock)
    if layers[1] == 0:  # nothing to iterate
        no_iterations = {"iterations": 0, "allocation": [0, 0, 0]}
        arguments |= {
            name: none for name, none in no_iterations.items() if isinstance(arguments.get(name), (int, list))
        }
    output = model.generate(batch_size=3, seed=0, return_dict_in_generate=True, **arguments)
    assert output.block_evaluations == len(calls)
    assert output.block_evaluations_per_sequence.max() == len(calls)
    assert len(calls) <= arguments.get("budget", len(calls))
    assert output.num_steps == len(output.iterations) <= arguments.get("num_steps", output.num_steps)


def test_final_decides_about_what_no_step_revealed(monkeypatch):
    model, length = lively_model(), 6
    reveal, token = torch.rand(2, 4, length, dtype=torch.float64)
    reveal[:, [1, 4]] = 0.0  # below every threshold: left over
    monkeypatch.setattr(reveal_module, "draw_uniforms", lambda *args, **kwargs: torch.stack([reveal, token]))
    steps = []
    call = {
        "batch_size": 4,
        "length": length,
        "num_steps": 3,
        "iterations": 2,
        "reuse": "none",
        "callback": steps.append,
    }
    none, sample, argmax = (model.generate(**call, final=final) for final in ("none", "sample", "argmax"))
    others = [0, 2, 3, 5]
    assert none[:, [1, 4]].eq(MASK).all() and none[:, others].ne(MASK).all()
    assert torch.equal(sample[:, others], none[:, others]) and torch.equal(argmax[:, others], none[:, others])
    # Both come from the last call of the denoiser.
    logits = model(steps[1].sequences, num_iterations=2).logits[:, [1, 4], :MASK]
    assert torch.equal(argmax[:, [1, 4]], logits.argmax(dim=-1))
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    assert torch.equal(sample[:, [1, 4]], (cumulative <= token[:, [1, 4], None]).sum(dim=-1))


def test_callback_sees_every_step():
    model, ids, steps = lively_model(), prompts(), []
    output = model.generate(ids, budget=30, seed=0, callback=steps.append, return_dict_in_generate=True)
    assert [s.step for s in steps] == list(range(output.num_steps))
    assert [s.time for s in steps] == pytest.approx([1 - i * (1 - 1e-5) / output.num_steps for i in range(len(steps))])
    before = ids
    for s in steps:
        assert s.num_steps == output.num_steps
        assert torch.equal(s.revealed, s.sequences != before)
        assert s.fixed_point_state.shape == (3, 8, 16) and s.residuals.shape == (output.iterations[s.step], 3)
        before = s.sequences
    assert torch.equal(before, output.sequences)
    assert torch.equal(sum(s.revealed.long() for s in steps), (ids == MASK).long())


def test_output_fields_describe_the_run():
    model, ids, steps = lively_model(), prompts(), []
    call = {"seed": 1, "callback": steps.append, "return_dict_in_generate": True}
    output = model.generate(ids, iterations=[4, 1, 3], **call)
    assert torch.equal(output.sequences, model.generate(ids, iterations=[4, 1, 3], seed=1))
    assert output.iterations == [4, 1, 3] and output.iterations_taken.tolist() == [[4] * 3, [1] * 3, [3] * 3]
    assert output.residuals.shape == (3, 4, 3)
    for step, taken in enumerate([4, 1, 3]):
        assert torch.equal(output.residuals[step, :taken], steps[step].residuals.float())
        assert output.residuals[step, taken:].isnan().all()
    assert output.reused[0] == {}
    visible = [ids, *(s.sequences for s in steps)]
    for step in (1, 2):
        old, new = visible[step - 1], visible[step]
        assert sum(output.reused[step].values()) == pytest.approx(1)
        assert output.reused[step] == pytest.approx(
            {
                "changed": (old != new).float().mean().item(),
                "unchanged": ((old == new) & (new != MASK)).float().mean().item(),
                "masked": (new == MASK).float().mean().item(),
                "remasked": 0.0,
            }
        )
    real = torch.ones_like(ids).index_fill(1, torch.tensor([6, 7]), 0)  # padding counts nowhere
    padded, shorter = (
        model.generate(x, iterations=[4, 1, 3], **call, **mask)
        for x, mask in ((ids, {"attention_mask": real}), (ids[:, :6], {}))
    )
    assert padded.reused == shorter.reused
    assert model.generate(ids, iterations=[4, 1], reuse="none", **call).reused == [{}, {}]
    explicit = tiny_model(num_fixed_point_layers=0).generate(ids, budget=6, **call)
    assert explicit.residuals.shape == (3, 0, 3) and explicit.iterations_taken.tolist() == [[0] * 3] * 3


# --- modes -----------------------------------------------------------------------------------------------------------


def test_generate_runs_without_dropout_beside_a_training_that_goes_on():
    model, modes, losses = tiny_model(dropout=0.5), [], []
    evaluated = model.generate(batch_size=2, seed=0, budget=24)
    assert not model.training
    model.train()
    model.post_layers.eval()  # a part that somebody froze
    before = [module.training for module in model.modules()]

    def train(step):
        modes.append([module.training for module in model.modules()])
        losses.append(model(prompts(), labels=prompts().clamp(max=MASK - 1)).loss.item())

    assert torch.equal(model.generate(batch_size=2, seed=0, budget=24, callback=train), evaluated)
    assert modes == [before] * len(modes) and [module.training for module in model.modules()] == before
    assert len(set(losses)) == len(losses) > 1  # dropout draws anew in each


def test_dropout_that_is_not_the_models_own_is_refused():
    model = tiny_model().train()
    model.embed_tokens = nn.Sequential(model.embed_tokens, nn.Dropout(0.5))
    refused(r"of these would act: \['embed_tokens.1'\].*`model.eval\(\)`", model.generate, budget=12)
    assert model.eval().generate(budget=12, seed=0).shape == (1, 8)


@contextmanager
def default(dtype=torch.float32, device=None):
    """PyTorch's defaults, for a while."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("defaults", "options"),
    [
        ({"dtype": torch.float64}, {}),
        ({"dtype": torch.float64}, {"tolerance": 0.05}),
        ({"dtype": torch.bfloat16}, {"solver": "anderson", "reuse": "full"}),
        ({"dtype": torch.bfloat16}, {"remask": 0.4, "final": "argmax"}),
        ({"device": "meta"}, {"order": "confidence", "temperature": 0.7}),
        ({"device": "meta"}, {"tolerance": 0.05, "solver": "anderson", "remask": 0.4, "final": "argmax"}),
        ({"device": "meta"}, {"input_ids": prompts().tolist(), "attention_mask": [[1] * 8, [1] * 7 + [0], [1] * 8]}),
    ],
    ids=str,
)
def test_pytorchs_defaults_change_nothing(defaults, options):
    model, call = lively_model(), {"budget": 30, "return_dict_in_generate": True, **options}
    expected = model.generate(**call, seed=1)
    torch.manual_seed(2)
    unseeded = model.generate(**call)
    with default(**defaults):
        found = model.generate(**call, seed=1)
        torch.manual_seed(2)
        again = model.generate(**call)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(again.sequences, unseeded.sequences)
    assert found.residuals.dtype == torch.float32
    torch.testing.assert_close(found.residuals, expected.residuals, rtol=0, atol=0, equal_nan=True)


def test_tokens_carry_no_graph_and_steps_may_outnumber_positions():
    model, states = lively_model(), []
    tokens = model.generate(
        length=3, num_steps=40, iterations=1, callback=lambda s: states.append(s.fixed_point_state), seed=0
    )
    assert tokens.shape == (1, 3) and tokens.ne(MASK).all()
    assert 3 < len(states) <= 40 and not any(state.requires_grad for state in states)


def test_progress_bar_is_shown_on_request_only(capsys):
    model = tiny_model()
    model.generate(budget=12)
    assert capsys.readouterr().err == ""
    model.generate(budget=12, progress_bar=True)
    assert "denoising" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 2}], ids=str)
@pytest.mark.parametrize("weight", ["lm_head.bias", "fixed_point.input_proj.weight"])
def test_weights_that_are_not_numbers_are_reported(weight, arguments):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(weight).flatten()[3] = float("nan")
    refused("logits that are not finite", model.generate, budget=24, seed=0, **arguments)
