# SPDX-License-Identifier: Apache-2.0
"""A text while it is revealed, as HTML: in the demonstration, and as an animation in a notebook."""

import re
from itertools import pairwise

import pytest

from fpmgm import RevealAnimation
from fpmgm.data import train_tokenizer
from fpmgm.models.text_input import text_of
from fpmgm.reveal_html import WORDS, Token, draw_residuals, draw_tokens

from .testing_utils import tiny_model


EVIL = "<img src=x onerror=alert(1)>"


def test_texts_are_escaped_and_every_state_has_a_colour():
    shown = draw_tokens([Token(EVIL, "given"), Token("a\tb\n", "changed"), Token("secret", "masked")])
    assert "<img" not in shown and "&lt;img src=x" in shown
    assert "a·b\n" in shown and "secret" not in shown
    assert re.findall(r'class="fp-(\w+)"', draw_tokens(Token("", state) for state in WORDS)) == ["text", *WORDS]


def test_residuals_are_placed_by_what_was_spent_and_on_a_logarithmic_scale():
    picture = draw_residuals([(1, [1.0, 0.1, 0.01]), (6, [float("nan"), 0.1])], budget=12)
    first, second = ([p.split(",") for p in found.split()] for found in re.findall(r'points="([^"]*)"', picture))
    x, y = ([float(point[i]) for point in first] for i in (0, 1))
    assert x[2] - x[1] == pytest.approx(x[1] - x[0], abs=0.2) and y[2] - y[1] == pytest.approx(y[1] - y[0], abs=0.2)
    assert y[0] < y[1] < y[2] and float(second[0][1]) == y[1]
    assert "1e-2" in picture and "1e0" in picture
    assert "first step is being computed" in draw_residuals([], 96) and "nan" not in picture
    assert "block evaluations, of 12" in picture and "block evaluations" not in draw_residuals([], 96)
    assert "no solver" in draw_residuals([(12, [])], 96) and "no solver" not in picture


def test_a_token_keeps_its_space_where_a_text_would_lose_it():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "▁cat": 1, "s": 2}, unk_token="a"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert [text_of(tokenizer, token) for token in (1, 2)] == [" cat", "s"]


def test_a_notebook_shows_every_step_once_and_the_prompt_in_all():
    tokenizer = train_tokenizer(["the cat sat on the mat, and the other cat sat on the other mat"] * 4, 270)
    model = tiny_model(scale=0.05, vocab_size=270, mask_token_id=269, input_injection="diagonal")
    animation = RevealAnimation(tokenizer)
    assert "generate(callback=" in animation._repr_html_()
    prompt = tokenizer("<b" + tokenizer.mask_token * 5, return_tensors="pt")["input_ids"]
    for _ in range(2):  # the second run takes the place of the first
        model.generate(prompt, num_steps=5, iterations=2, seed=0, callback=animation)
        shown = animation._repr_html_()
    frames = re.findall(r'<div class="fp-text">(.*?)</div>', shown)
    masked = [frame.count("fp-masked") for frame in frames]
    assert masked[0] == 5 and masked[-1] == 0 and masked == sorted(masked, reverse=True)
    assert all("fp-given" in frame and "<b<" not in frame for frame in frames)
    assert [frame.count("fp-changed") for frame in frames[1:]] == [a - b for a, b in pairwise(masked)]
    delays = [float(found) for found in re.findall(r"steps\(1\) (-[\d.]+)s", shown)]
    assert delays == sorted(delays) and len(delays) == len(frames)


def test_a_notebook_shows_a_run_whose_first_steps_were_idle():
    tokenizer = train_tokenizer(["the cat sat on the mat, and the other cat sat on the other mat"] * 4, 270)
    model = tiny_model(vocab_size=270, mask_token_id=269, num_fixed_point_layers=0)
    animation, prompt, numbers = RevealAnimation(tokenizer), tokenizer("a" + tokenizer.mask_token + "b"), []
    for seed in range(6):  # the only step that runs is a later or an earlier one than in the run before
        seen = []
        out = model.generate([prompt["input_ids"]], budget=16, seed=seed, callback=seen.append)
        model.generate([prompt["input_ids"]], budget=16, seed=seed, callback=animation)
        numbers += [step.step for step in seen]
        frames = re.findall(r'<div class="fp-text">(.*?)</div>', animation._repr_html_())
        assert [frame.count("fp-masked") for frame in frames] == [1, 0]
        assert animation.states[-1].tolist() == out[0].tolist()
    assert len(numbers) == 6 and 0 not in numbers[:1] and numbers != sorted(numbers, reverse=True)
