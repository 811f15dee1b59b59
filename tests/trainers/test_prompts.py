# SPDX-License-Identifier: Apache-2.0
"""Prompts and completions become the ids that generation meets, and train as rows of ids with labels do."""

import json
import math

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fpmgm.data import train_tokenizer
from fpmgm.models.noise import stream_generator
from fpmgm.trainers import ConsistencyTrainer, ConversionTrainer, MGMTrainer, SDTTTrainer, encode_prompts

from ..testing_utils import refused, tiny_image_model, word_tokenizer
from .reference import (
    PROMPTED,
    SEED,
    TEXT,
    assert_gradient,
    corrupt,
    cross_entropy,
    of_student,
    recorded,
    with_weights,
)
from .training_utils import LENGTH, image_rows, losses, make_trainer, token_rows, training_model, weights


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = ["sort the words: the cat sat", "the cat", "what is on the mat?"]


def byte_pairs() -> PreTrainedTokenizerFast:
    """GPT-2's kind: it joins a space to the word behind it and puts nothing around a text."""
    return train_tokenizer(TEXTS * 9, 270)


def framed() -> PreTrainedTokenizerFast:
    """BERT's kind, of words: CLS and SEP around a text, no EOS."""
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = word_tokenizer([*names.values(), *sorted({*" ".join(TEXTS).split()})], **names)
    frame = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.backend_tokenizer.post_processor = frame
    return tokenizer


def beginning() -> PreTrainedTokenizerFast:
    """Llama's kind: BOS before a text, and a mark for the space before each word, the first too."""
    letters = ["<s>", "</s>", "<mask>", "<unk>", "▁", *sorted({*"".join(TEXTS)} - {" "}), "▁cat", "▁ca", "▁c", "▁the"]
    made = Tokenizer(
        models.BPE({token: i for i, token in enumerate(letters)}, [("▁", "c"), ("▁c", "a"), ("▁ca", "t")])
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


TOKENIZERS = {"byte pairs": byte_pairs, "framed": framed, "beginning": beginning}


def encoded(rows, tokenizer=None, length=64, **options) -> list[dict]:
    return list(encode_prompts(rows, tokenizer or byte_pairs(), length, **options))


def parts(row: dict) -> tuple[list[int], list[int]]:
    """The ids of a row before the first that is to be written, and the others."""
    start = row["completion_mask"].index(1)
    assert row["completion_mask"] == [0] * start + [1] * (len(row["input_ids"]) - start)
    return row["input_ids"][:start], row["input_ids"][start:]


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("what is on the mat?", " the cat"), ("the ", "cat"), ("", "the cat")]
)
def test_the_prompt_is_what_generation_is_given_and_the_completion_ends(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]()
    end = tokenizer.sep_token_id if kind == "framed" else tokenizer.eos_token_id
    (row,) = encoded([{"prompt": prompt, "completion": completion}], tokenizer, completion_multiple=4)
    before, written = parts(row) if prompt or kind != "byte pairs" else ([], row["input_ids"])
    assert before == tokenizer(prompt)["input_ids"]
    ended = written.index(end)
    assert len(written) % 4 == 0 and len(written) - ended <= 4 and set(written[ended:]) == {end}
    assert tokenizer.decode(written[:ended]).strip() == completion.strip()
    if kind != "framed":  # of words alone nothing tells what was between them
        read = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert (read.replace("  ", " ") if kind == "beginning" else read) == prompt + completion


@pytest.mark.parametrize(
    ("multiple", "length", "expected"), [(1, 64, 3), (3, 64, 3), (8, 64, 8), (32, 64, 32), (32, 9, 5)]
)
def test_completions_are_filled_with_eos_up_to_a_multiple_or_the_models_length(multiple, length, expected):
    tokenizer = byte_pairs()
    for completion in ("xy", "xy<|endoftext|>", "xy<|endoftext|> \n"):  # an end that is there already is not doubled
        (row,) = encoded(
            [{"prompt": "wzzw", "completion": completion}], tokenizer, length, completion_multiple=multiple
        )
        assert parts(row)[1] == [*tokenizer("xy")["input_ids"], *[tokenizer.eos_token_id] * (expected - 2)]


def test_a_completion_behind_a_token_of_the_frame_is_encoded_alone():
    """Word pieces would go on with the prompt's last word, from which SEP parts them."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "stone", "river", "##river"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    (row,) = encoded([{"prompt": "stone", "completion": "river"}], tokenizer, completion_multiple=1)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "stone", "[SEP]", "river", "[SEP]"]


def test_every_answer_of_a_conversation_is_a_row_behind_the_prompt_that_the_template_writes():
    tokenizer = byte_pairs()
    tokenizer.chat_template = CHAT
    roles, said = ("system", *("user", "assistant") * 2), ("be brief", "the cat?", "sat", "the mat?", "yes")
    talk = [{"role": role, "content": text, "name": None} for role, text in zip(roles, said, strict=True)]
    several = encoded([{"messages": talk[1:3]}, {"messages": [*talk, talk[1]]}], tokenizer, 128, completion_multiple=1)
    assert len(several) == 3
    for row, messages, answer in zip(several, (talk[1:2], talk[:2], talk[:4]), ("sat", "sat", "yes"), strict=True):
        prompt, written = parts(row)
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == expected and tokenizer.decode(written) == f"{answer}<|endoftext|>"
    split = {"prompt": talk[:4], "completion": talk[4:]}
    assert encoded([split], tokenizer, 128, completion_multiple=1) == several[2:]


def test_the_model_is_told_what_ends_an_answer(tmp_path):
    for tokenizer in (byte_pairs(), framed()):
        model = training_model(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
        rows = [{"prompt": "the", "completion": "cat"}]
        trainer = make_trainer(tmp_path, model, train_dataset=rows, processing_class=tokenizer, completion_multiple=2)
        end = trainer.train_dataset[0]["input_ids"][-1]
        assert model.config.eos_token_id == model.generation_config.eos_token_id == end


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_names_of_special_tokens_are_special_but_for_the_masks(kind):
    tokenizer = TOKENIZERS[kind]()
    name = tokenizer.sep_token or tokenizer.eos_token
    prompt = f"the {tokenizer.mask_token} cat {name} sat"
    (row,) = encoded([{"prompt": prompt, "completion": f"the {tokenizer.mask_token} cat"}], tokenizer)
    before, written = parts(row)
    assert tokenizer.mask_token_id not in row["input_ids"]
    if kind == "byte pairs":
        assert tokenizer.decode(before) == prompt and before.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(written, skip_special_tokens=True) == f"the {tokenizer.mask_token} cat"


class Map(torch.utils.data.Dataset):
    """PyTorch's kind of dataset."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        torch.rand(1)  # as what varies pictures
        return self.rows[index]


def test_rows_of_every_source_become_the_same_ids(tmp_path):
    rows = [{"prompt": f"{word} ", "completion": "the cat" * (i % 3 + 1)} for i, word in enumerate("abcdefgh")]
    expected = encoded(rows)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**row, "id": 1}) + "\n" for row in rows), encoding="utf-8"
    )
    file = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
    stream = Dataset.from_list(rows).to_iterable_dataset()
    for data in (file, stream, Map(rows), Dataset.from_list(rows).with_format("torch")):
        found = [{name: list(map(int, row[name])) for name in row} for row in encoded(data)]
        assert found == expected
    assert encoded(file, num_proc=2) == expected
    ids = token_rows(3)
    assert encode_prompts(ids, None, 16) is ids and encode_prompts(None, None, 16) is None
    state, drawn_rows = torch.get_rng_state(), Map([{"input_ids": [1]}])
    assert encode_prompts(drawn_rows, None, 16) is drawn_rows and torch.equal(torch.get_rng_state(), state)


# --- refused ---------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "the cat", "completion": " sat"}
TALK = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat"}]
REFUSED = {
    "empty completion": ({**GOOD, "completion": ""}, r"row 1 of the data: `completion` is empty: leave the row out"),
    "only an end": ({**GOOD, "completion": "<|endoftext|>"}, "row 1 of the data: `completion` has nothing to write"),
    "no completion": ({**GOOD, "completion": None}, r"row 1.*'completion': 'NoneType'\}: give two texts, or two"),
    "mixed": ({**GOOD, "completion": TALK[1:]}, r"row 1.*\{'prompt': 'str', 'completion': 'list'\}: give two texts"),
    "number": ({"prompt": 3, "completion": 4}, "row 1 of the data: `prompt` is '3': give text, or messages"),
    "long": ({**GOOD, "completion": "x" * 99}, r"row 1 of the data has \d+ tokens of its prompt and 100 of its compl"),
    "no dict": ("the cat", "row 1 of the data is a str, but the first is a dict"),
}  # fmt: skip
REFUSED_TALK = {
    "no answer": (TALK[:1], r"row 1 of the data: `messages` has no turn of the assistant, but roles \['user'\]"),
    "no messages": ([], r"row 1 of the data: `messages` is '\[\]'"),
    "text": ("the cat?", "row 1 of the data: `messages` is 'the cat\\?': give text, or messages, each with `role`"),
    "no role": ([{"content": "a"}], r"row 1 of the data: `messages` is .*each with `role` and `content`"),
    "no content": (
        [{"role": "user", "text": "the cat?"}, TALK[1]],
        "row 1 of the data: `messages` is .*each with `role` and `content`",
    ),
    "empty answer": (
        [TALK[0], {"role": "assistant", "content": ""}],
        "row 1 of the data: the answer has nothing to write, its `content` is empty: leave the row out",
    ),
    "refused": (
        [*TALK, {"role": "assistant", "content": "boo"}],
        "row 1 of the data: .* refuses the messages: no boo",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_says_nothing_to_write_is_named(name):
    bad, message = REFUSED[name]
    refused(message, encoded, [GOOD, bad, GOOD])
    if name in ("empty completion", "only an end", "no completion", "long"):
        data = Dataset.from_list([GOOD, bad, GOOD])
        refused(message, encoded, data)
        refused(message, encoded, data.to_iterable_dataset())


@pytest.mark.parametrize("name", REFUSED_TALK)
def test_messages_that_make_no_answer_are_named(name):
    bad, message = REFUSED_TALK[name]
    tokenizer = byte_pairs()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'boo' %}{{ raise_exception('no boo') }}{% endif %}{% endfor %}"
        + CHAT
    )
    for end in ("<|endoftext|>", "<|end of turn|>"):  # one that is no EOS is written behind nothing too
        tokenizer.chat_template = tokenizer.chat_template.replace("<|endoftext|>", end)
        refused(message, encoded, [{"messages": TALK}, {"messages": bad}], tokenizer)


def test_what_a_tokenizer_lacks_is_named():
    talk = [{"messages": TALK}]
    refused(r"no chat template: set `tokenizer.chat_template`, or give `prompt` and", encoded, talk)
    without = byte_pairs()
    without.eos_token = without.bos_token = None
    refused(r"no EOS token, by which a model ends its answer: set `tokenizer\.eos_t", encoded, [GOOD], without)
    refused(
        r"`processing_class` is NoneType: give the model's tokenizer, `AutoTokenizer", encode_prompts, [GOOD], None, 64
    )
    thinking = byte_pairs()  # a template that begins an answer otherwise than it writes it
    thinking.chat_template = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    refused(r"row 0.*does not write the prompt .*<think>' before the answer", encoded, talk, thinking)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "a"}, r"columns \['prompt'\]: a row has `prompt` and `completion`, or `messages`"),
        ({"completion": "a"}, r"columns \['completion'\]"),
        ({**GOOD, "messages": TALK}, r"columns \['completion', 'messages', 'prompt'\]"),
        ({**GOOD, "tools": "[]"}, "`tools`, which are not read"),
    ],
)
def test_columns_that_say_too_little_or_too_much_are_refused(columns, message):
    for data in ([columns], Dataset.from_list([columns]), Dataset.from_list([columns]).to_iterable_dataset()):
        refused(message, encode_prompts, data, byte_pairs(), 64)


def test_long_rows_are_refused_cut_or_dropped(caplog):
    tokenizer = byte_pairs()
    rows = [{"prompt": "wz", "completion": "x" * n} for n in (3, 20, 5, 6)]
    message = r"row 1.* 2 tokens of its prompt and 21 of.*at most 8.*'drop'.*, `long_rows='cut'"
    refused(message, encoded, rows, tokenizer, 8, long_rows="error")
    cut = encoded(rows, tokenizer, 8, long_rows="cut", completion_multiple=1)
    assert [tokenizer.decode(parts(row)[1]) for row in cut] == [
        "xxx<|endoftext|>",
        "x" * 6,
        "xxxxx<|endoftext|>",
        "x" * 6,
    ]
    dropped = encoded(rows, tokenizer, 8, long_rows="drop", completion_multiple=1)
    assert dropped == [cut[0], cut[2]]
    assert encoded(Dataset.from_list(rows), tokenizer, 8, long_rows="drop", completion_multiple=1) == dropped
    for option, message in (
        ("cut", r"8 tokens of its prompt.*leaves such rows out\."),
        ("drop", "no row of the data is left"),
    ):
        refused(message, encoded, [{"prompt": "wzzwwzzw", "completion": "x"}], tokenizer, 8, long_rows=option)
    with pytest.raises(ValueError, match=r"`long_rows`='keep' must be one of \('error', 'cut', 'drop'\)"):
        encoded(rows, tokenizer, 8, long_rows="keep")
    refused("`completion_multiple`=0 must be", encoded, rows, tokenizer, 8, completion_multiple=0)


# --- training --------------------------------------------------------------------------------------------------------

LETTERS = train_tokenizer(["a"], 258)
SIZES = {"vocab_size": 258, "mask_token_id": LETTERS.mask_token_id}
ROWS = [
    {"prompt": f"{word}>", "completion": word[::-1]} for word in ("abc", "de", "fghij", "kl", "mno", "p", "qrst", "uv")
]


def by_hand(completion_only: bool = True) -> list[dict]:
    """`ROWS` as ids, with labels of -100 at the prompts."""
    result = []
    for row in ROWS:
        prompt, answer = LETTERS(row["prompt"])["input_ids"], LETTERS(row["completion"])["input_ids"]
        answer += [LETTERS.eos_token_id] * (4 - len(answer) % 4)
        result.append(
            {"input_ids": prompt + answer, "labels": [-100 if completion_only else i for i in prompt] + answer}
        )
    return result


TRAINERS = {
    MGMTrainer: {},
    ConsistencyTrainer: {"stop_at_perplexity_increase": None},
    ConversionTrainer: {"teacher": training_model(seed=1, num_fixed_point_layers=0, **SIZES)},
    SDTTTrainer: {"rounds": 1, "steps_per_round": 2},
}


def trained(folder, rows, kind=MGMTrainer, **options) -> MGMTrainer:
    run = {"max_steps": 2, "processing_class": LETTERS, "train_dataset": rows, **TRAINERS[kind], **options}
    trainer = make_trainer(folder, training_model(**SIZES), kind, **run)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_prompts_train_as_ids_with_labels_in_every_trainer(tmp_path, kind):
    expected = losses(trained(tmp_path, by_hand(), kind))
    assert losses(trained(tmp_path, ROWS, kind, completion_multiple=4)) == expected
    if kind is not MGMTrainer:  # the others read their rows as it does
        return
    masks = [
        {"input_ids": row["input_ids"], "completion_mask": [int(i != -100) for i in row["labels"]]}
        for row in by_hand()
    ]
    assert losses(trained(tmp_path, masks, kind)) == expected
    whole = losses(trained(tmp_path, by_hand(completion_only=False), kind))
    assert (
        losses(trained(tmp_path, ROWS, kind, completion_multiple=4, completion_only_loss=False)) == whole != expected
    )
    assert losses(trained(tmp_path, masks, kind, completion_only_loss=False)) == whole


def test_a_run_on_prompts_is_evaluated_resumed_and_adapted_as_any_other(tmp_path):
    options = {"completion_multiple": 4, "save_strategy": "steps", "save_steps": 1, "peft_config": LoraConfig(r=2)}
    data = Dataset.from_list(ROWS)
    torch.manual_seed(0)  # for the adapter's weights
    whole = trained(tmp_path / "whole", data, eval_dataset={"a": ROWS, "b": by_hand()}, **options)
    metrics = whole.evaluate()
    assert metrics["eval_a_loss"] == metrics["eval_b_loss"]
    assert whole.evaluate(ROWS)["eval_loss"] == whole.evaluate(by_hand())["eval_loss"] == metrics["eval_a_loss"]
    assert whole.predict(ROWS).metrics["test_loss"] == metrics["eval_a_loss"]
    assert {"lora" in name for name, p in whole.model.named_parameters() if p.requires_grad} == {True}
    torch.manual_seed(0)
    trained(tmp_path / "resumed", data, max_steps=1, **options)
    resumed = trained_on(tmp_path / "resumed", data, options)
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[name])
    with pytest.raises(ValueError, match=r"the training rows \(of other content\)"):
        trained_on(tmp_path / "resumed", Dataset.from_list(ROWS[::-1]), options)
    assert whole.model.generation_config.eos_token_id in (LETTERS.eos_token_id, [LETTERS.eos_token_id])


def trained_on(folder, data, options) -> MGMTrainer:
    trainer = make_trainer(
        folder, training_model(**SIZES), max_steps=2, processing_class=LETTERS, train_dataset=data, **options
    )
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_prompts_in_streams_and_conversations_train(tmp_path):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert len(losses(trained(tmp_path, stream, completion_multiple=4, remove_unused_columns=False))) == 2
    tokenizer = train_tokenizer(["a"], 258)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ '>' if m.role == 'user' else '' }}{% endfor %}"
    talk = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"][:-1]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in ROWS
    ]
    chatted = trained(tmp_path, Dataset.from_list(talk), processing_class=tokenizer, completion_multiple=4)
    assert losses(chatted) == losses(trained(tmp_path, ROWS, completion_multiple=4))


def test_masks_of_completions_are_checked(tmp_path):
    good = {"input_ids": [1] * 4, "completion_mask": [0, 0, 1, 1]}
    for bad, message in (
        (
            [0, 0, 2, 1],
            r"row 1.*`completion_mask` holds 2 at position 2: 1 where the model is to write, 0 at the prompt",
        ),
        ([0, 1], r"row 1.*`completion_mask` is of shape \(2,\) for 4 `input_ids`"),
    ):
        refused(message, trained, tmp_path, [good, {**good, "completion_mask": bad}], per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="`completion_mask` is there beside `labels`, which say the same"):
        trained(tmp_path, [{**good, "labels": [1] * 4}] * 4)
    refused("nothing to score", make_trainer(tmp_path, eval_dataset=[{**good, "completion_mask": [0] * 4}]).evaluate)


@pytest.mark.parametrize(
    ("option", "value"),
    [("completion_multiple", 8), ("long_rows", "cut"), ("completion_only_loss", False), ("random_length_share", 0.5)],
)
def test_options_of_prompts_that_would_do_nothing_are_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}`=.* would do nothing: images have one length, and no prompts"):
        make_trainer(tmp_path, tiny_image_model(), train_dataset=image_rows(4), **{option: value})
    if option != "random_length_share":
        message = rf"`{option}`=.* would do nothing: the rows have the columns \['input_ids'\]"
        refused(message, make_trainer, tmp_path, **{option: value})
    make_trainer(tmp_path, training_model(**SIZES), train_dataset=ROWS, processing_class=LETTERS, **{option: value})


def test_prompts_in_several_parts_are_refused(tmp_path):
    refused(r"has the parts \['train'\]: give one", trained, tmp_path, DatasetDict(train=Dataset.from_list(ROWS)))


# --- random lengths --------------------------------------------------------------------------------------------------


def drawn(step: int) -> tuple[float, float]:
    """Whether a step is cut (below the share), and what of its rows stays."""
    return tuple(torch.rand(2, generator=stream_generator(SEED, "train", step, "length")).tolist())


def cut_length(scored: torch.Tensor, share: float) -> int:
    """Tokens of a row up to the last of the `share` of its `scored` positions, (L,), that is kept; all if none is."""
    places = scored.nonzero().flatten()
    return int(places[max(1, math.ceil(share * len(places))) - 1]) + 1 if len(places) else len(scored)


@pytest.mark.parametrize(("kind", "batch"), [(TEXT, 4), (PROMPTED, 1)], ids=["plain", "prompted"])
def test_cut_rows_keep_a_share_of_what_may_be_masked_and_train_by_the_formula(tmp_path, kind, batch):
    model, whole, cut = training_model().double(), {tuple(ids) for ids in kind.rows(7)["input_ids"]}, 0
    _, steps = recorded(make_trainer, tmp_path, kind, model, batch, random_length_share=0.5, max_steps=6)
    for number, step in enumerate(steps):
        uniform, share = drawn(number)
        for ids in step.rows:  # a short one may begin as several rows do
            originals = [torch.tensor(row) for row in whole if list(row[: len(ids)]) == ids.tolist()]
            wanted = [cut_length(kind.scored(row), share) if uniform < 0.5 else len(row) for row in originals]
            assert len(ids) in wanted
            cut += len(ids) < min(map(len, originals))
        noisy = corrupt(step, number, kind=kind)
        student = with_weights(model, step.weights)
        assert_gradient(student, cross_entropy(of_student(student, noisy, step), noisy), step.gradient)
    assert cut > 0 and any(drawn(number)[0] >= 0.5 for number in range(len(steps)))


def test_shares_and_lengths_are_uniform():
    draws = torch.tensor([drawn(step) for step in range(2000)])
    assert (draws[:, 0] < 0.1).sum() == pytest.approx(200, abs=50)
    lengths = (draws[:, 1] * LENGTH).ceil().clamp(min=1).long().bincount(minlength=LENGTH + 1)[1:]
    assert all(85 < count < 165 for count in lengths)  # 125 expected, standard deviation 11
