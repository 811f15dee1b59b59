# SPDX-License-Identifier: Apache-2.0
"""Generative perplexity against a loop over single tokens; scores on disk against the uninterrupted run."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from fpmgm.conversion.cka import layer_similarity
from fpmgm.data import train_tokenizer
from fpmgm.evaluation import Judge, TruthJudge, elbo_perplexity, generative_perplexity, load_judge, sample_texts
from fpmgm.evaluation.judge import decode_for, token_log_probabilities
from fpmgm.evaluation.mauve import last_token_features
from tests.evaluation.helpers import TEXTS, tiny_judge
from tests.models.helpers import lively_model
from tests.testing_utils import refused


LENGTH = 24


@torch.no_grad()
def reference(judge: Judge, text: str, add_start_token: bool = False) -> list[float]:
    """log p of each scored token, one token at a time, nothing padded."""
    ids = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = judge.tokenizer.eos_token_id
    ids = ([end] if add_start_token else []) + ids
    found, ends = [], 0
    for i, token in enumerate(ids[:LENGTH]):
        ends += token == end
        if i == 0 or (token == end and ends > 1):
            continue
        found.append(judge.model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[token].item())
    return found


@pytest.mark.parametrize(("batch_size", "add_start_token"), [(1, False), (4, False), (6, False), (6, True)])
def test_both_means_are_those_of_a_loop_over_tokens(batch_size, add_start_token):
    judge = tiny_judge()
    found = generative_perplexity(
        TEXTS, judge, batch_size=batch_size, max_length=LENGTH, add_start_token=add_start_token
    )
    scores = [reference(judge, text, add_start_token) for text in TEXTS]
    scored = [score for score in scores if score]
    means = [-np.mean(score) for score in scored]
    perplexity = math.exp(np.mean(means))
    assert found["generative_perplexity"] == pytest.approx(perplexity, rel=1e-9)
    assert found["generative_perplexity_token_weighted"] == pytest.approx(
        math.exp(-np.mean(np.concatenate(scored))), rel=1e-9
    )
    error = perplexity * np.std(means, ddof=1) / math.sqrt(len(means))
    assert found["generative_perplexity_standard_error"] == pytest.approx(error, rel=1e-9)
    protocol = found["protocol"]
    assert (protocol["judge"], protocol["max_length"], protocol["num_samples"]) == ("tiny", LENGTH, 6)
    assert protocol["num_unscored"] == 6 - len(scored) == (1 if add_start_token else 2)
    assert protocol["num_tokens"] == sum(map(len, scored))
    assert protocol["num_truncated"] == 3 if add_start_token else 2
    assert protocol["first_token"] == ("predicted from BOS" if add_start_token else "given")


def test_an_interrupted_run_goes_on_to_the_same_scores(tmp_path, monkeypatch):
    judge, options = tiny_judge(), {"batch_size": 2, "max_length": LENGTH}
    straight = generative_perplexity(TEXTS, judge, **options)
    calls = []

    def interrupted(*arguments, fail_at=None):
        calls.append(arguments[1])
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return token_log_probabilities(*arguments)

    monkeypatch.setattr("fpmgm.evaluation.judge.token_log_probabilities", lambda *a: interrupted(*a, fail_at=3))
    with pytest.raises(KeyboardInterrupt):
        generative_perplexity(TEXTS, judge, cache_dir=tmp_path, **options)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text()[:-5])  # the last line torn off, as by a power cut
    calls.clear()
    monkeypatch.setattr("fpmgm.evaluation.judge.token_log_probabilities", interrupted)
    assert generative_perplexity(TEXTS, judge, cache_dir=tmp_path, **options) == straight
    assert calls == [TEXTS[2:4], TEXTS[4:6]]  # the torn batch and the one that failed
    calls.clear()
    assert generative_perplexity(TEXTS, judge, cache_dir=tmp_path, **options) == straight and calls == []
    # Another protocol, or another judge of the same name or weights, does not read those scores.
    generative_perplexity(TEXTS, judge, cache_dir=tmp_path, batch_size=2, max_length=LENGTH - 1)
    other = generative_perplexity(TEXTS, tiny_judge(seed=1), cache_dir=tmp_path, **options)
    assert len(calls) == 6 and other["generative_perplexity"] != straight["generative_perplexity"]
    lower = tiny_judge()
    lower.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    generative_perplexity(TEXTS, lower, cache_dir=tmp_path, **options)
    deaf = tiny_judge()
    deaf.model.config.layer_norm_epsilon = 0.5
    generative_perplexity(TEXTS, deaf, cache_dir=tmp_path, **options)
    assert len(calls) == 12


ROWS = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]


def truth_of(judge: Judge) -> TruthJudge:
    return TruthJudge("tiny", judge.model, torch.zeros(2, 6, dtype=torch.long), torch.ones(2))


MEASURES = {
    "perplexity": lambda model, judge: generative_perplexity(TEXTS, judge, max_length=24),
    "features": lambda model, judge: last_token_features(judge, TEXTS, max_length=24).tolist(),
    "log p": lambda model, judge: truth_of(judge).log_probabilities(ROWS).tolist(),
    "features of the truth": lambda model, judge: truth_of(judge).features(ROWS).tolist(),
    "texts of the truth": lambda model, judge: [x.tolist() for x in sample_texts(judge.model, [(0, 1)], 6)],
    "likelihood": lambda model, judge: elbo_perplexity(model, ROWS, num_draws=2),
    "layers": lambda model, judge: layer_similarity(model, [torch.tensor(ROWS)]).tolist(),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_model_in_training_is_measured_without_dropout_and_trains_on(name):
    model, judge = lively_model(dropout=0.5, max_position_embeddings=6), tiny_judge()
    expected = MEASURES[name](model.eval(), judge)
    model.train(), judge.model.train()
    assert MEASURES[name](model, judge) == expected
    assert all(module.training for whole in (model, judge.model) for module in whole.modules())


def test_special_tokens_stay_where_the_judge_ends_texts_alike():
    judge = tiny_judge()
    ids = judge.tokenizer("<|endoftext|>ab<|endoftext|>")["input_ids"]
    assert decode_for(judge, judge.tokenizer, [ids]) == (["<|endoftext|>ab<|endoftext|>"], "kept")
    other = tiny_judge().tokenizer
    other.eos_token = "<|mask|>"
    assert decode_for(Judge("other", judge.model, other), judge.tokenizer, [ids]) == (["ab"], "dropped")


def test_the_name_of_a_bos_of_its_own_is_not_judged_as_text():
    judge, text = tiny_judge(), tiny_judge().tokenizer("ab")["input_ids"]
    judge.tokenizer.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    begin, pad, end = (getattr(judge.tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos"))
    assert decode_for(judge, judge.tokenizer, [[begin, *text, end, pad]]) == (["ab<|endoftext|>"], "kept")


def test_special_tokens_without_a_part_of_their_own_are_not_judged_as_text():
    judge, text = tiny_judge(), tiny_judge().tokenizer("ab")["input_ids"]
    judge.tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<plain>", special=False)])
    turn, plain = judge.tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<plain>"])
    assert turn not in judge.tokenizer.all_special_ids
    rows = [[turn, *text, plain, turn, judge.tokenizer.eos_token_id]]
    assert decode_for(judge, judge.tokenizer, rows) == (["ab<plain><|endoftext|>"], "kept")


def test_kept_scores_belong_to_the_judges_adapters_as_they_are_now(tmp_path):
    judge, options = tiny_judge(), {"max_length": LENGTH, "cache_dir": tmp_path}
    judge.model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True))
    adapted = generative_perplexity(TEXTS, judge, **options)["generative_perplexity"]
    judge.model.disable_adapters()
    plain = generative_perplexity(TEXTS, judge, **options)["generative_perplexity"]
    assert plain == generative_perplexity(TEXTS, tiny_judge(), max_length=LENGTH)["generative_perplexity"] != adapted


def test_a_judge_is_loaded_from_a_folder(tmp_path):
    judge = tiny_judge()
    judge.model.float().save_pretrained(tmp_path)
    judge.tokenizer.save_pretrained(tmp_path)
    loaded = load_judge(tmp_path, device="cpu")
    assert load_judge(loaded) is loaded and loaded.weights == judge.weights != tiny_judge(seed=1).weights
    options = {"max_length": LENGTH}
    found = generative_perplexity(TEXTS, tmp_path, **options)
    assert found["generative_perplexity"] == generative_perplexity(TEXTS, judge, **options)["generative_perplexity"]
    assert found["protocol"]["judge"] == tmp_path.name


def test_a_judge_that_sees_what_it_predicts_is_refused(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": LENGTH}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    tiny_judge().tokenizer.save_pretrained(tmp_path)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    refused("sees the tokens that it is to predict", load_judge, tmp_path, device="cpu")
    config.is_decoder = True
    BertLMHeadModel(config).save_pretrained(tmp_path)
    assert generative_perplexity(TEXTS, tmp_path, max_length=LENGTH)["generative_perplexity"] > 1


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="older ones read no single merge")
def test_a_judge_is_loaded_from_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": LENGTH}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, rms_norm_eps=1e-5))
    with torch.no_grad():  # the file format permutes queries and keys; equal ones are the same in any order
        for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            projection.weight.zero_()
    tokenizer = train_tokenizer(["the then they"], 259)  # bytes, the two special tokens and one merge
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, model, tokenizer)
    judge = load_judge(path, device="cpu")
    assert judge.name == "tiny.gguf"
    assert judge.tokenizer("the fox")["input_ids"] == tokenizer("the fox")["input_ids"]
    texts = TEXTS[:2]
    expected = generative_perplexity(texts, Judge("same", model.eval(), tokenizer), max_length=LENGTH)
    found = generative_perplexity(texts, judge, max_length=LENGTH)
    assert found["generative_perplexity"] == pytest.approx(expected["generative_perplexity"], rel=1e-5)


def write_gguf(gguf, path, model: LlamaForCausalLM, tokenizer: AutoTokenizer) -> None:
    config, layer = model.config, model.model.layers[0]
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "block_count": 1, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads, "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.hidden_size // config.num_attention_heads, "vocab_size": config.vocab_size,
    }  # fmt: skip
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    tensors = {
        "token_embd": model.model.embed_tokens,
        "output": model.lm_head,
        "output_norm": model.model.norm,
        "blk.0.attn_norm": layer.input_layernorm,
        "blk.0.ffn_norm": layer.post_attention_layernorm,
        "blk.0.attn_q": layer.self_attn.q_proj,
        "blk.0.attn_k": layer.self_attn.k_proj,
        "blk.0.attn_v": layer.self_attn.v_proj,
        "blk.0.attn_output": layer.self_attn.o_proj,
        "blk.0.ffn_gate": layer.mlp.gate_proj,
        "blk.0.ffn_up": layer.mlp.up_proj,
        "blk.0.ffn_down": layer.mlp.down_proj,
    }
    for name, module in tensors.items():
        writer.add_tensor(f"{name}.weight", module.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_start_token_needs_a_tokenizer_that_has_one():
    judge, message = tiny_judge(), "`add_start_token`=True, but the tokenizer of 'tiny' has no BOS"
    judge.tokenizer.bos_token = None
    refused(message, generative_perplexity, TEXTS, judge, max_length=LENGTH, add_start_token=True)
