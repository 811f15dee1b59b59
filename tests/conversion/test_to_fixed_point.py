# SPDX-License-Identifier: Apache-2.0
"""Conversion: which weights go where, and that the student computes what the chosen layers do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion, convert_to_fixed_point

from ..testing_utils import refused, tiny_model


DEPTH, LENGTH, MASK = 7, 8, 10
PREFIXES = {"pre": "pre_layers", "fixed_point": "fixed_point.layers", "post": "post_layers"}


def teacher_model(pre: int = DEPTH, seed: int = 0, **overrides) -> FPMDLMForMaskedDiffusion:
    """Float64 layers that all differ, in one stack or split into two."""
    sizes = {"num_pre_layers": pre, "num_fixed_point_layers": 0, "num_post_layers": DEPTH - pre}
    return tiny_model(seed, 0.1, **{**sizes, **overrides}).double()


def ids() -> torch.Tensor:
    return torch.randint(0, MASK + 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [DEPTH, 3])
@pytest.mark.parametrize(
    "layer_map",
    [
        {"pre": [1], "fixed_point": [6], "post": [7]},
        {"pre": [1, 3], "fixed_point": [5, 4], "post": [6, 2, 7]},
        {"pre": [2], "fixed_point": [2], "post": []},
    ],
)
def test_every_weight_is_the_named_layers_or_stands_outside_the_stacks(pre, layer_map):
    teacher = teacher_model(pre)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = convert_to_fixed_point(teacher, layer_map)
    layers = [*teacher.pre_layers, *teacher.post_layers]
    sources = {
        f"{PREFIXES[stack]}.{place}.{name}": parameter
        for stack, chosen in layer_map.items()
        for place, number in enumerate(chosen)
        for name, parameter in layers[number - 1].named_parameters()
    }
    stacks = ("pre_layers.", "post_layers.")
    sources |= {name: p for name, p in before.items() if not name.startswith(stacks)}
    found = dict(student.named_parameters())
    assert {name for name in found if name not in sources} == {
        name for name in found if name.startswith(("fixed_point.input_proj.", "fixed_point.injection."))
    }
    assert [name for name, source in sources.items() if not torch.equal(found[name], source)] == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert (student.dtype, student.training) == (torch.float64, False)
    assert [getattr(student.config, f"num_{stack}_layers") for stack in PREFIXES] == list(map(len, layer_map.values()))


def test_a_saved_student_knows_which_layers_it_was_made_of(tmp_path, caplog):
    layer_map = {"pre": (1,), "fixed_point": [3, 2], "post": []}
    convert_to_fixed_point(teacher_model(), layer_map).save_pretrained(tmp_path)
    student = FPMDLMForMaskedDiffusion.from_pretrained(tmp_path)
    assert student.config.layer_map == {"pre": [1], "fixed_point": [3, 2], "post": []}
    assert "layer_map" not in caplog.text and FPMDLMConfig().layer_map is None


def test_a_student_that_is_not_initialised_is_a_fresh_model():
    teacher = teacher_model().float()
    torch.manual_seed(5)
    student = convert_to_fixed_point(teacher, {"pre": [1], "fixed_point": [2, 3], "post": [4]}, initialize=False)
    sizes = {"num_pre_layers": 1, "num_fixed_point_layers": 2, "num_post_layers": 1}
    names = ("vocab_size", "mask_token_id", "hidden_size", "num_attention_heads", "intermediate_size")
    names += ("conditioning_size", "max_position_embeddings", "dropout")
    torch.manual_seed(5)
    fresh = FPMDLMForMaskedDiffusion(
        FPMDLMConfig(input_injection="diagonal", **sizes, **{n: getattr(teacher.config, n) for n in names})
    )
    found = dict(student.named_parameters())
    assert [name for name, p in fresh.named_parameters() if not torch.equal(found[name], p)] == []


def test_overrides_change_the_student_alone_and_its_generation_is_its_own():
    teacher = teacher_model()
    student = convert_to_fixed_point(
        teacher, {"pre": [1], "fixed_point": [6], "post": [7]}, input_injection="linear", num_fixed_point_iterations=9,
        dropout=0.25,
    )  # fmt: skip
    assert (student.config.input_injection, student.config.num_fixed_point_iterations) == ("linear", 9)
    assert (student.config.dropout, student.pre_layers[0].dropout, teacher.config.dropout) == (0.25, 0.25, 0.0)
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    student.generation_config.temperature = 0.5
    assert teacher.generation_config.temperature == 1.0


# --- the function ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def composed(teacher, numbers: list[int], tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Logits of the teacher's layers `numbers`, run in that order between its embedding and its head."""
    layers = [*teacher.pre_layers, *teacher.post_layers]
    h = teacher.embed_tokens(tokens)
    conditioning = teacher.conditioning(t, h.device)
    for number in numbers:
        layer = layers[number - 1]
        h = layer(h, layer.modulation(conditioning), teacher.rotary(h))
    shift, scale = teacher.final_modulation(conditioning)
    return teacher.lm_head(teacher.final_norm(h) * (1 + scale) + shift)


@pytest.mark.parametrize("injection", ["mlp", "linear"])
@pytest.mark.parametrize("iterations", [1, 4])
def test_the_student_iterates_the_chosen_layers(injection, iterations, monkeypatch):
    monkeypatch.setattr("fpmgm.conversion.to_fixed_point.INJECTION_NOISE", 0)
    teacher, t = teacher_model(3, time_conditioning=True), torch.tensor([0.1, 0.5, 1.0])
    layer_map = {"pre": [1, 2], "fixed_point": [6, 4], "post": [7]}
    student = convert_to_fixed_point(teacher, layer_map, input_injection=injection)
    expected = composed(teacher, [1, 2, *[6, 4] * iterations, 7], ids(), t)
    with torch.no_grad():
        logits = student(ids(), timesteps=t, num_iterations=iterations).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    others = composed(teacher, [1, 2, *[6, 4] * (iterations + 1), 7], ids(), t)
    assert (others - expected).abs().max() > 1e-2


def test_an_identity_map_of_few_layers_is_the_teacher_itself():
    teacher = tiny_model(0, 0.1, num_pre_layers=3, num_fixed_point_layers=0, num_post_layers=0).double()
    student = convert_to_fixed_point(teacher, {"pre": [1], "fixed_point": [2], "post": [3]})
    with torch.no_grad():
        found, expected = student(ids(), num_iterations=1).logits, teacher(ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_noise_lies_on_the_weights_of_u_alone_and_lets_the_pre_stack_learn(monkeypatch):
    teacher, layer_map = teacher_model(hidden_size=64), {"pre": [1], "fixed_point": [6], "post": [7]}
    noisy, again = (convert_to_fixed_point(teacher, layer_map, input_injection="mlp") for _ in range(2))
    monkeypatch.setattr("fpmgm.conversion.to_fixed_point.INJECTION_NOISE", 0)
    silent = convert_to_fixed_point(teacher, layer_map, input_injection="mlp")
    changed = {name for name, p in noisy.named_parameters() if not torch.equal(p, silent.get_parameter(name))}
    name = "fixed_point.injection.input_proj.weight"
    assert changed == {name}
    noise = noisy.get_parameter(name).detach() - silent.get_parameter(name).detach()
    assert noise.std().item() == pytest.approx(1e-3, rel=0.05) and abs(noise.mean()) < 5e-5
    assert torch.equal(noisy.get_parameter(name), again.get_parameter(name))
    with torch.no_grad():
        difference = (noisy(ids(), num_iterations=2).logits - silent(ids(), num_iterations=2).logits).abs().max()
    assert 0 < difference < 0.1
    for student, learns in ((noisy, True), (silent, False)):
        student(ids(), labels=ids().clamp(max=MASK - 1), num_iterations=3).loss.backward()
        assert bool(student.pre_layers[0].up_proj.weight.grad.any()) == learns


def test_by_default_the_injection_starts_as_the_mean_of_state_and_input_whatever_the_teachers():
    t = torch.full((3,), 0.5)
    for teacher in (teacher_model(), teacher_model(input_injection="linear")):
        student = convert_to_fixed_point(teacher, {"pre": [1], "fixed_point": [6], "post": [7]})
        assert student.config.input_injection == "diagonal"
        with torch.no_grad():  # the first iteration starts at h = u
            found = student(ids(), num_iterations=1).logits
        torch.testing.assert_close(found, composed(teacher, [1, 6, 7], ids(), t), rtol=1e-10, atol=1e-10)


# --- by similarity, and mistakes -------------------------------------------------------------------------------------


# The boundary is before layer 5, where it is taken; before layer 7, which the post-stack has; before layer 2 of two.
@pytest.mark.parametrize(("strong", "pre", "taken"), [(5, 1, 5), (7, 1, 5), (2, 2, 3)])
def test_auto_takes_the_layers_around_the_strongest_boundary(strong, pre, taken):
    teacher = teacher_model(4).train()
    layers = [*teacher.pre_layers, *teacher.post_layers]
    with torch.no_grad():
        for number, layer in enumerate(layers, start=1):
            layer.modulation.weight.zero_()
            layer.modulation.bias.zero_()
            layer.modulation.bias.chunk(6)[5].fill_(30.0 if number == strong else 0.05)  # the MLP's gate
    batches = torch.stack([ids(), ids().flip(0)])
    student = convert_to_fixed_point(teacher, "auto", batches=batches, num_pre_layers=pre, num_post_layers=2)
    stacks = [*student.pre_layers, *student.fixed_point.layers, *student.post_layers]
    sources = [*layers[:pre], layers[taken - 1], *layers[-2:]]
    for found, source in zip(stacks, sources, strict=True):
        assert torch.equal(found.up_proj.weight, source.up_proj.weight)
    assert teacher.training


LAYERS = {"pre": [1], "fixed_point": [6], "post": [7]}


@pytest.mark.parametrize(
    ("layer_map", "options", "message"),
    [
        ({**LAYERS, "post": [12]}, {}, r"'post': \[12\].*layers 1 to 7.*'auto'"),
        ({**LAYERS, "pre": [0]}, {}, r"'pre': \[0\].*layers 1 to 7"),
        ({**LAYERS, "fixed_point": []}, {}, "'fixed_point'"),
        ({"pre": [1], "fixed_point": [6]}, {}, "`layer_map`"),
        ("automatic", {}, "`layer_map`='automatic'.*'auto'"),
        ("auto", {}, "`batches` is empty"),
        ("auto", {"batches": ids()[None], "num_post_layers": 6}, r"'post': 6.* more layers than the 7"),
        (LAYERS, {"batches": [torch.zeros(1, 4).long()]}, "`batches` are for `layer_map`='auto'"),
        (LAYERS, {"tie_word_embeddings": True}, "`tie_word_embeddings`=True with `initialize`=True"),
        (LAYERS, {"num_fixed_point_layers": 2}, "`num_fixed_point_layers`=2"),  # the map names one
    ],
)
def test_what_cannot_be_followed_or_would_be_lost_is_refused(layer_map, options, message):
    refused(message, convert_to_fixed_point, teacher_model(), layer_map, **options)


def test_a_fixed_point_teacher_is_refused():
    refused("`num_fixed_point_layers`=1", convert_to_fixed_point, tiny_model())


def test_a_teacher_with_adapters_is_refused_until_they_are_merged():
    layer_map, config = {"pre": [1], "fixed_point": [2], "post": [4]}, LoraConfig(r=2, target_modules=["up_proj"])
    injected = teacher_model()
    injected.add_adapter(config)
    wrapped = get_peft_model(teacher_model(), config)
    for model in (injected, wrapped):
        refused(r"adapter\(s\) \['default'\].*merge_and_unload", convert_to_fixed_point, model, layer_map)
    merged = wrapped.merge_and_unload()
    expected = merged.pre_layers[1].up_proj.weight
    assert convert_to_fixed_point(merged, layer_map).fixed_point.layers[0].up_proj.weight.equal(expected)
