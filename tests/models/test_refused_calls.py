# SPDX-License-Identifier: Apache-2.0
"""What `generate` cannot do is named: the argument, the value, what is allowed."""

import pytest
import torch
from transformers import GenerationConfig

from tests.testing_utils import tiny_image_model, tiny_model


M = 10  # the mask of tiny_config
IDS = [[1, 2, M, M, M, 6, M, M], [0, M, M, 4, M, M, M, 9]]
CODES = torch.tensor([[7] * 9, [1, 2, 7, 7, 7, 6, 7, 7, 7], [7, 7, 7, 7, 0, 7, 7, 5, 7], [7, 3, 7, 7, 7, 7, 4, 7, 4]])
TEXT = [
    # steps, draws and tokens
    ({"budget": 2}, r"`budget`=2 .*at least 3\b"),
    ({"budget": 20, "num_steps": 9}, r"`budget`=20 .*at least 27\b"),
    ({"budget": 0}, "`budget`=0 must be a whole number"),
    ({"budget": 9.5}, "`budget`=9.5 must be a whole number"),
    ({"budget": None}, "`budget`=None and `iterations`=None"),
    ({"budget": 24, "iterations": 3}, "`budget`=24 and `iterations`=3 exclude each other"),
    ({"iterations": 3}, "`iterations`=3 needs `num_steps`"),
    ({"iterations": 0, "num_steps": 3}, "`iterations`=0 must be a whole number"),
    ({"iterations": [2, 0]}, "`iterations`=0 must be a whole number"),
    ({"iterations": [2, 2], "num_steps": 3}, "`num_steps`=3 must be the length 2"),
    ({"num_steps": 0}, "`num_steps`=0 must be a whole number"),
    ({"num_steps": 1.5}, "`num_steps`=1.5 must be a whole number"),
    ({"allocation": "linear"}, "`allocation`='linear' must be one of"),
    ({"allocation": None}, "`allocation`=None must be"),
    ({"reuse": "half"}, "`reuse`='half' must be one of"),
    ({"gamma_masked": [0.5]}, "`gamma_masked`"),
    ({"gamma_changed": 1.5}, "`gamma_changed`=1.5"),
    ({"order": "alphabetical"}, "`order`='alphabetical' must be one of"),
    ({"final": "leave"}, "`final`='leave' must be one of"),
    ({"temperature": -0.1}, "`temperature`=-0.1"),
    ({"temperature": float("nan")}, "`temperature`=nan"),
    ({"temperature": "hot"}, "`temperature`='hot'"),
    ({"top_p": 0}, "`top_p`=0"),
    ({"top_p": 1.01}, "`top_p`=1.01"),
    ({"top_k": 0}, "`top_k`=0 must be a whole number"),
    ({"max_length": 20}, "`max_length`: use `length`"),
    ({"do_sample": False}, "`do_sample`: use `temperature=0`"),
    ({"num_step": 3}, "num_step'.*'num_steps'"),
    ({"length": 9}, "`length`=9 .*`max_position_embeddings`=8"),
    ({"length": 0}, "`length`=0 must be a whole number"),
    ({"length": 5, "input_ids": torch.full((1, 6), M)}, "`length`=5 must be the length 6"),
    ({"batch_size": 0}, "`batch_size`=0 must be a whole number"),
    ({"batch_size": 3, "input_ids": torch.full((2, 6), M)}, "`batch_size`=3 must be the 2 rows"),
    ({"input_ids": torch.full((1, 9), M)}, "`input_ids` of shape .*`max_position_embeddings`=8"),
    ({"input_ids": torch.full((8,), M)}, "`input_ids` of shape"),
    ({"input_ids": torch.tensor([[11, M]])}, "`input_ids` holds ids from 10 to 11.*`vocab_size`=11"),
    ({"input_ids": torch.tensor([[-1, M]])}, "`input_ids` holds ids from -1 to 10"),
    ({"input_ids": torch.tensor([[1, M], [1, 2]])}, r"`input_ids` has no mask in row\(s\) \[1\]"),
    (
        {"input_ids": torch.tensor([[1, M]]), "attention_mask": torch.tensor([[1, 0]])},
        r"`input_ids` has no mask in row\(s\) \[0\]",
    ),
    ({"attention_mask": torch.ones(1, 7)}, r"`attention_mask` of shape \(1, 7\) must have the shape \(1, 8\)"),
    ({"seed": 1, "generator": torch.Generator()}, "`seed`=1 and `generator` exclude each other"),
    ({"seed": [1, 2, 3], "batch_size": 2}, "`seed` lists 3 seeds for 2 sequences"),
    ({"seed": 1.5}, "`seed`=1.5 must be a whole number"),
    ({"seed": True}, "`seed`=True must be a whole number"),
    ({"seed": False}, "`seed`=False must be a whole number"),
    ({"seed": 0.0}, "`seed`=0.0 must be a whole number"),
    ({"seed": [1, "2"], "batch_size": 2}, "`seed`=.* must be a whole number"),
    # types
    ({"input_ids": [[1.0, M]]}, "`input_ids`=.* must be whole numbers, not torch.float32"),
    ({"input_ids": [[True, False]]}, "`input_ids`=.* must be whole numbers, not torch.bool"),
    ({"input_ids": [["a", "b"]]}, "`input_ids`=.* must be numbers in rows of one length"),
    ({"input_ids": [[1, M], [M]]}, "`input_ids`=.* must be numbers in rows of one length"),
    ({"input_ids": torch.tensor([[1, M]]).to_sparse()}, "`input_ids`=.* neither sparse nor quantised"),
    ({"input_ids": torch.full((1, 2), M, device="meta")}, "`input_ids`=.* must be numbers"),
    ({"input_ids": 5}, r"`input_ids` of shape \(\)"),
    ({"input_ids": []}, r"`input_ids` of shape \(0,\)"),
    ({"input_ids": IDS, "attention_mask": [[0.5] * 8] * 2}, r"`attention_mask`=.* must hold 0 \(padding\) and 1"),
    ({"input_ids": IDS, "attention_mask": [[2] * 8] * 2}, r"`attention_mask`=.* must hold 0 \(padding\) and 1"),
    ({"input_ids": IDS, "attention_mask": [["no"] * 8] * 2}, "`attention_mask`=.* must be numbers"),
    ({"input_ids": IDS, "attention_mask": [1] * 8}, r"`attention_mask` of shape \(8,\) must have the shape"),
    ({"input_ids": IDS[:1], "attention_mask": [1] * 8, "batch_size": 2}, r"`attention_mask` of shape \(8,\)"),
    ({"budget": "24"}, "`budget`='24' must be a whole number of block evaluations"),
    ({"temperature": "0.5"}, "`temperature`='0.5' must be a number"),
    ({"top_p": "0.9"}, r"`top_p`='0.9' must lie in \(0, 1\]"),
    ({"top_k": "5"}, "`top_k`='5' must be a whole number"),
    ({"seed": "1"}, "`seed`='1' must be a whole number"),
    ({"tolerance": "0.1"}, "`tolerance`='0.1' must be at least 0"),
    ({"progress_bar": "no"}, "`progress_bar`='no' must be True or False"),
    ({"return_dict_in_generate": "no"}, "`return_dict_in_generate`='no' must be True or False"),
    ({"progress_bar": 1}, "`progress_bar`=1 must be True or False"),
    ({"batch_size": 2.0}, "`batch_size`=2.0 must be a whole number"),
    ({"length": "8"}, "`length`='8' must be a whole number"),
    ({"callback": 3}, "`callback`=3 must be a function"),
    ({"streamer": 3}, "`streamer`=3 must have `put` and `end`"),
    ({"generator": 3}, "`generator`=3 must be a torch.Generator"),
    ({"generation_config": {"budget": 3}}, r"`generation_config` is a dict, not one: give an `fpmgm.MGM"),
    (
        {"generation_config": GenerationConfig()},
        "GenerationConfig, transformers' own .* `fpmgm.MGMGenerationConfig`",
    ),
    ({"budget": 10**30}, r"`budget`=1000000000000000000000000000000 must be .* at most 1,000,000"),
    ({"budget": 10**5000}, "`budget`=<int> must be a whole number"),
    ({"num_steps": 10**9}, r"`num_steps`=1000000000 must be .* at most 100,000"),
    ({"num_steps": 2, "iterations": 10**9}, "`iterations`=1000000000 must be"),
    ({"iterations": [1] * 10**6}, "`iterations`="),
    ({"num_steps": 10**5, "iterations": 100}, "`iterations` cost 10,200,000 block evaluations"),
    ({"batch_size": 10**9}, r"`batch_size`=1000000000 must be .* at most 1,048,576"),
    ({"batch_size": 2**20, "num_steps": 10**4, "iterations": 1, "remask": 0.1}, "random numbers at"),
    ({"bugdet": 24}, r"\(`bugdet`: did you mean `budget`\?\).*'batch_size'.*'length'.*'seed'.*'streamer'"),
    ({"max_tokens": 24}, r"\(`max_tokens`: did you mean `max_new_tokens`\?\)"),
    ({"xyz": 24}, r"unknown generation argument\(s\) \['xyz'\]: known are"),
    ({"lenght": 8}, "did you mean `length`"),
    # remasking and the solver
    ({"remask": 0.0}, "`remask`=0.0 must lie in"),
    ({"tolerance": -1.0}, "`tolerance`=-1.0 must be at least 0"),
    ({"solver": "newton"}, "`solver`='newton' must be one of"),
    # orders
    ({"order": "entropy", "remask": 0.1}, "`remask`=0.1 needs `order`='ancestral', not 'entropy'"),
    ({"order": "entropy", "entropy_bound": -1}, "`entropy_bound`=-1 must be a number of nats >= 0"),
    ({"order": "threshold", "confidence_threshold": 1.5}, r"`confidence_threshold`=1.5 must lie in \[0, 1\]"),
    ({"order": "margin", "margin_threshold": "all"}, "`margin_threshold`='all' must lie in"),
    ({"entropy_bound": 0.5}, "`entropy_bound`=0.5 needs `order`='entropy', not 'ancestral'"),
    ({"order": "margin", "confidence_threshold": 0.5}, "`confidence_threshold`=0.5 needs `order`='threshold'"),
    # prompts
    ({"max_new_tokens": 3}, "`max_new_tokens`=3 are put behind a prompt: give `input_ids`, or `length`"),
    (
        {"input_ids": [[1] * 6], "max_new_tokens": 3},
        "`max_new_tokens`=3 .* 6 tokens .*`max_position_embeddings`=8",
    ),
    ({"input_ids": [[1] * 6], "max_new_tokens": 0}, "`max_new_tokens`=0 must be a whole number of tokens"),
    ({"input_ids": [1, 2], "max_new_tokens": 1}, r"`input_ids` of shape \(2,\) must be \(batch, length\)"),
    (
        {"input_ids": [[1, 2]], "attention_mask": [[1]], "max_new_tokens": 1},
        r"`attention_mask` of shape \(1, 1\) must have the shape \(1, 2\)",
    ),
    ({"input_ids": [[1]], "max_new_tokens": 3, "length": 5}, "`length`=5 must be the length 4"),
    ({"stop_at_eos": True}, "`stop_at_eos`=True needs to know .*`eos_token_id=tokenizer.eos_token_id`"),
    ({"stop_at_eos": True, "eos_token_id": M}, "`eos_token_id`=10 must be a token that the model can write"),
    ({"stop_at_eos": True, "eos_token_id": 1, "remask": 0.1}, "`stop_at_eos`=True and `remask`=0.1 exclude"),
    ({"block_length": 0}, "`block_length`=0 must be a whole number of tokens"),
    ({"block_length": 2, "budget": 9}, "`block_length`=2 makes 4 blocks .* there are 1 steps"),
    # what only images have
    ({"class_labels": 0}, "`class_labels`=0 cannot be given"),
    ({"guidance_scale": 2.0}, "`guidance_scale`=2.0 needs `class_labels`"),
    ({"order": "random"}, "`order`='random' must be one of"),
    # frozen positions
    ({"refresh_every": 2}, "`refresh_every`=2 is about frozen positions: give `freeze=True` too"),
    ({"freeze_tolerance": 0.1}, "`freeze_tolerance`=0.1 is about frozen positions"),
    ({"freeze": True, "refresh_every": 0}, "`refresh_every`=0"),
    # a number of steps beside what chooses it
    ({"num_steps": 2, "iterations": 3, "allocation": "cosine"}, "`allocation`='cosine' shares a budget"),
    ({"num_steps": 2, "iterations_per_step": 1}, "`iterations_per_step`=1 chooses the number of steps"),
    (
        {"num_steps": 2, "iterations": 3, "iterations_per_step": 1},
        "`iterations_per_step`=1 chooses the number of steps",
    ),
]
EXPLICIT = [
    ({"freeze": True, "freeze_tolerance": 0.1}, "the model has no fixed-point layers"),
    ({"tolerance": 0.1}, "no fixed-point layers"),
    ({"solver": "anderson"}, "no fixed-point layers"),
    ({"num_steps": 2, "iterations": 3}, "the model lacks"),
]
IMAGES = [
    ({"class_labels": [0, 4]}, r"`class_labels`=\[0, 4\] .* from 0 to 2, or 3 for no class"),
    ({"class_labels": -1}, "`class_labels`=-1 must be"),
    ({"class_labels": 1.0}, "`class_labels`=1.0 must be"),
    ({"class_labels": [True]}, r"`class_labels`=\[True\] must be"),
    ({"class_labels": []}, r"`class_labels`=\[\] must be"),
    ({"class_labels": "cat"}, "`class_labels`='cat' must be"),
    ({"class_labels": [[1, 2]]}, r"`class_labels`=\[\[1, 2\]\] must be"),
    ({"class_labels": [0, 1], "batch_size": 3}, "`class_labels` has 2 classes for 3 sequences"),
    ({"class_labels": [0, 1, 2], "input_ids": CODES}, "`class_labels` has 3 classes for 4 sequences"),
    ({"guidance_scale": 2.0}, "`guidance_scale`=2.0 needs `class_labels`"),
    ({"guidance_scale": -1.0, "class_labels": 1}, "`guidance_scale`=-1.0 must be"),
    ({"guidance_scale": "high", "class_labels": 1}, "`guidance_scale`='high' must be"),
    ({"guidance_schedule": "cosine"}, "`guidance_schedule`='cosine' must be one of"),
    ({"order": "ancestral"}, r"`order`='ancestral' must be one of \('halton', 'random', 'confidence', 'entropy',"),
    ({"remask": 0.1}, "`remask`=0.1 needs `order`='ancestral', not 'halton'"),
    ({"final": "none"}, "`final`='none' needs `order`='ancestral'"),
    ({"num_steps": 10, "iterations": 1}, "`num_steps`=10 exceeds the 9 masked positions"),
    ({"num_steps": 7, "iterations": 1, "input_ids": CODES}, "`num_steps`=7 exceeds the 6 masked positions"),
    ({"length": 4}, "`length`=4 must be 9"),
    ({"length": 16}, "`length`=16"),
    ({"input_ids": CODES[:, :4]}, "`length`=4 must be 9"),
    ({"input_ids": CODES + 1}, "`input_ids` holds ids from 1 to 8"),
    ({"attention_mask": torch.ones(1, 9)}, "`attention_mask` cannot be given"),
    ({"class_labels": [0, "a"]}, r"`class_labels`=\[0, 'a'\] must be a whole number"),
    ({"class_labels": 10**30}, "`class_labels`=1000000000000000000000000000000 must be"),
]
MODELS = {  # which no call changes
    "text": (tiny_model(), TEXT),
    "explicit": (tiny_model(num_fixed_point_layers=0), EXPLICIT),
    "images": (tiny_image_model(), IMAGES),
}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [(kind, *case) for kind, (_, cases) in MODELS.items() for case in cases],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value if value in MODELS else "",
)
def test_a_call_that_cannot_be_honoured_is_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS[kind][0].generate(**arguments)
