# SPDX-License-Identifier: Apache-2.0
"""The recipe that trains on prompts, as a person would use it, on a few words that are to be written backwards."""

import json
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

import sample
import train_sft
from tests.recipes.options import QUIET, SHORT, SMALL, configured
from tests.testing_utils import refused


WORDS = ("stone", "river", "light", "cloud", "bread", "house", "paper", "green")
EVERY_TWO = [*SHORT, *QUIET, "--lr_scheduler_type", "constant", "--eval_steps", "2", "--save_steps", "2"]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_answers_are_learned_from_a_file_and_from_conversations_and_a_run_goes_on(tmp_path, capsys):
    file = write(tmp_path / "answers.jsonl", [{"prompt": f"{word}>", "completion": word[::-1]} for word in WORDS * 3])
    folder = tmp_path / "model"
    argv = [*configured("sft_small"), "--text_files", file, "--output_dir", str(folder), *SMALL, *EVERY_TWO]
    train_sft.main([*argv, "--max_steps", "2"])
    said = capsys.readouterr().out
    assert "tokenizer: trained here on 1 local file(s), 258 tokens" in said
    assert "data: 23 rows of at most 64 tokens to train on, 1 rows to validate on" in said
    assert f"recipes/sample.py --model {folder} --prompt ... --max_new_tokens 12 --stop_at_eos True" in said
    (text,) = sample.main(["--model", str(folder), "--prompt", "stone>", "--max_new_tokens", "12", "--device", "cpu"])
    assert text.startswith("stone>")  # as training read it: nothing stands before the prompt
    metrics = train_sft.main([*argv, "--max_steps", "4"])
    assert f"resuming from {folder / 'checkpoint-2'}" in capsys.readouterr().out
    straight = train_sft.main([*argv, "--max_steps", "4", "--output_dir", str(tmp_path / "straight")])
    assert straight["eval_loss"] == metrics["eval_loss"]
    record = json.loads((folder / "checkpoint-4/run.json").read_text("utf-8"))
    assert (
        record["data"]["train"]["rows"] == 23 and record["data"]["text_files"][0]["bytes"] == Path(file).stat().st_size
    )
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])

    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    talk = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]}
        for word in WORDS
    ]
    held_out = write(tmp_path / "held_out.jsonl", talk[:2])
    talks = ["--text_files", write(tmp_path / "talks.jsonl", talk), "--eval_text_files", held_out]
    start = ["--model_name_or_path", str(folder), *talks, *EVERY_TWO, "--max_steps", "1"]
    train_sft.main([*start, "--use_peft", "--lora_r", "2", "--output_dir", str(tmp_path / "adapter")])
    said = capsys.readouterr().out
    assert "data: 8 rows of at most 64 tokens to train on, 2 rows to validate on" in said
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_files_without_answers_are_refused(tmp_path):
    for rows, message in (
        ([{"prompt": "a"}] * 9, r"columns \['prompt'\]: a row has `prompt` and `completion`"),
        ([{"prompt": "a", "completion": ""}] * 9, "row 0 of the training data: `completion` is empty"),
        ([{"prompt": "a", "completion": "b"}], "too few to hold some out"),
    ):
        argv = [*configured("sft_small"), "--text_files", write(tmp_path / "a.jsonl", rows), *SMALL, *EVERY_TWO]
        refused(message, train_sft.main, [*argv, "--max_steps", "1", "--output_dir", str(tmp_path / "model")])
