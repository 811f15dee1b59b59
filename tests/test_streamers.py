# SPDX-License-Identifier: Apache-2.0
"""The streamer shows every step and ends on the finished text."""

import io
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fpmgm import TextStreamer
from fpmgm.data import train_tokenizer
from tests.testing_utils import refused, tiny_model


def tokenizer_and_model():
    tokenizer = train_tokenizer(["a text about texts, to be cut into tokens " * 20], 270)
    sizes = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "max_position_embeddings": 12}
    return tokenizer, tiny_model(**sizes)


def test_every_step_is_shown_with_blanks_where_nothing_is_written():
    tokenizer, model = tokenizer_and_model()
    shown = []
    tokens = model.generate(batch_size=2, budget=24, seed=0, streamer=TextStreamer(tokenizer, shown.append))
    assert len(shown) == 4 and all(len(texts) == 2 for texts in shown)
    blanks = [sum(text.count("░") for text in texts) for texts in shown]
    assert blanks == sorted(blanks, reverse=True) and blanks[0] > 0 and blanks[-1] == 0
    assert shown[-1] == [tokenizer.decode(row) for row in tokens]


def test_the_terminal_is_rewritten_in_place(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tokenizer, _ = tokenizer_and_model()
    streamer = TextStreamer(tokenizer)
    streamer.put(torch.full((1, 5), tokenizer.mask_token_id))
    streamer.put(torch.tensor([tokenizer("a text")["input_ids"]]))
    streamer.end()
    assert capsys.readouterr().out == "\x1b[J░░░░░\n\x1b[1F\x1b[Ja text\n"
    streamer.put(torch.tensor([tokenizer("next")["input_ids"]]))
    assert capsys.readouterr().out == "\x1b[Jnext\n"  # what was finished stays


def test_a_file_gets_the_finished_texts_alone(capsys):
    tokenizer, model = tokenizer_and_model()
    streamer = TextStreamer(tokenizer)
    tokens = [model.generate(batch_size=2, budget=24, seed=seed, streamer=streamer) for seed in (0, 1)]
    texts = ["\n\n".join(tokenizer.decode(row) for row in rows) for rows in tokens]
    assert capsys.readouterr().out == f"{texts[0]}\n{texts[1]}\n"


@pytest.mark.parametrize(
    ("encoding", "blank", "letter"), [("ascii", "_", "?"), ("latin-1", "_", "é"), ("utf-8", "░", "é")]
)
def test_a_terminal_gets_what_its_encoding_has(monkeypatch, encoding, blank, letter):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tokenizer, _ = tokenizer_and_model()
    streamer = TextStreamer(tokenizer)
    streamer.put(torch.tensor([[*tokenizer("é")["input_ids"], tokenizer.mask_token_id]]))
    assert written.getvalue().decode(encoding) == f"\x1b[J{letter}{blank}\n"


def test_a_tokenizer_without_mask_is_refused():
    tokenizer, _ = tokenizer_and_model()
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    refused("`tokenizer` has no mask token", TextStreamer, plain)
