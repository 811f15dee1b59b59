# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model `fpmgm`: scores and writes text with a masked diffusion model under a named protocol."""

from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from inspect import signature
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string
from tqdm.auto import tqdm
from transformers.utils import logging

from ...models.arguments import SEED, check_whole, one_of
from ...models.noise import stream_generator
from ...models.text_input import boundary_ids, encode_marked, encode_text, tokenizer_contents
from ..likelihood import check_iterations
from ..samples import check_setting, sampling_protocol
from ..store import code, digest
from .chat import render_chat
from .loading import (
    DEFAULT_BATCH_SIZE,
    check_batch_size,
    check_device,
    check_max_length,
    check_tokenizer,
    load_model,
    load_tokenizer,
)
from .protocols import PROTOCOLS, Request, assemble, thinned
from .scoring import Block, Denoiser, collate, greedy_matches, weighted_sums
from .writing import Job, Written, write


logger = logging.get_logger(__name__)


@register_model("fpmgm")
class MGMLM(TemplateLM):
    """A masked diffusion language model for lm-eval. The arguments are lm-eval's `--model_args`.

    Args:
        pretrained (`str`, `Path` or `PreTrainedModel`): Folder or hub name, of an adapter too; or a model (with
            `tokenizer`).
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`, *optional*): `None`: that of `pretrained`.
        peft (`str` or `Path`, *optional*): Folder or hub name of an adapter to merge into the weights. `None`: none.
        revision (`str`, defaults to `"main"`): Of `pretrained` on the hub.
        trust_remote_code (`bool`, defaults to `False`): For checkpoints of classes that this package does not have.
        device (`str`, *optional*): `None`: each process its own GPU, or the CPU where there is none.
        dtype (`str`, defaults to `"auto"`): Of the weights: the checkpoint's, or `"float32"`, `"float64"`,
            `"bfloat16"`, `"float16"`. Probabilities are float64 in any case.

        > Parameters that control the likelihood

        protocol (`str`, defaults to `"pgm"`): Key of [`PROTOCOLS`]. Scores of different protocols do not compare.
        mc_num (`int`, *optional*): Monte-Carlo draws per request. `None`: the protocol's own.
        iterations (`int`, *optional*): Fixed-point iterations of a forward pass. `None`: the model configuration's
            `num_fixed_point_iterations`.
        batch_size (`int` or `"auto"`, defaults to 64): Masked copies in a forward pass; does not change the scores.
        max_length (`int`, *optional*): Longest input; more is cut off on the left, and counted. `None`: the model's
            `max_position_embeddings`.
        seed (`int`, defaults to 0): A request's noise depends on the seed and the request alone.

        > Parameters that control `generate_until`

        budget (`int`, *optional*): Block evaluations per text. `None`: the model's own.
        num_steps (`int`, *optional*): Denoising steps. `None`: the model's own, or chosen from the budget.
        reuse (`str`, *optional*): `"none"`, `"full"` or `"3sr"`. `None`: the model's own.

    Raises:
        `ValueError`: names the argument, its value and what is allowed.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
    >>> from fpmgm.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["the cat sat on the mat"], 260)
    >>> model = FPMDLMForMaskedDiffusion(FPMDLMConfig(vocab_size=260, mask_token_id=259, hidden_size=8,
    ...     num_attention_heads=2, intermediate_size=16, conditioning_size=4, max_position_embeddings=32))
    >>> lm = MGMLM(model, tokenizer=tokenizer, protocol="llada", device="cpu")
    >>> request = Instance("loglikelihood", {}, ("the cat", " sat"), 0)
    >>> [(score, greedy)] = lm.loglikelihood([request], disable_tqdm=True)
    >>> round(score / len(tokenizer(" sat")["input_ids"]), 2)  # a fresh model: log 1/259 per token
    -5.56

    ```
    """

    def __init__(
        self,
        pretrained: str | Path | torch.nn.Module,
        tokenizer: Any = None,
        peft: str | Path | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        device: str | None = None,
        dtype: str = "auto",
        protocol: str = "pgm",
        mc_num: int | None = None,
        iterations: int | None = None,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        seed: int = 0,
        budget: int | None = None,
        num_steps: int | None = None,
        reuse: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = [name for name in signature(MGMLM).parameters if name != "unknown"]
            raise ValueError(f"unknown model argument(s) {sorted(unknown)}: known are {known}.")
        one_of(PROTOCOLS).check("protocol", protocol)
        self.protocol_name, self.protocol = protocol, PROTOCOLS[protocol]
        self.seed = SEED.check("seed", seed)
        self.mc_num = self.protocol.mc_num if mc_num is None else check_whole("mc_num", mc_num, 1, "draws")
        self.batch_size = check_batch_size(batch_size)
        self._start_processes(check_device(device))
        self.model = load_model(pretrained, peft, revision, dtype, trust_remote_code).to(self._device)
        self.tokenizer = load_tokenizer(tokenizer, pretrained, revision, trust_remote_code)
        check_tokenizer(self.tokenizer, self.model.config, self.protocol.joint)
        self.max_length = check_max_length(max_length, self.model.config)
        self.iterations = check_iterations("iterations", iterations, self.model.config)
        self.denoiser = Denoiser(self.model, self.iterations)
        generation = {"budget": budget, "num_steps": num_steps, "reuse": reuse}
        self.generation = {name: value for name, value in generation.items() if value is not None}
        # A wrong value is an error now, not hours later; into how many blocks a text is cut, the task says.
        check_setting(self.model, self.generation, self.model.generation_config.block_length, reveals=False)
        self.source = {
            "pretrained": str(getattr(pretrained, "name_or_path", pretrained)),
            "revision": revision,
            "peft": None if peft is None else str(peft),
        }
        self.begin, self.end = boundary_ids(self.tokenizer)
        self.chat = False  # whether prompts come from a chat template
        self.written = Written()
        self.truncated = 0  # requests so far that were longer than `max_length`

    # --- what lm-eval asks for besides answers ---

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "MGMLM":
        """The model of `--model_args`, to which the protocol's name is added: lm-eval prints them above its table."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.get("device") == "cuda:0" and not torch.cuda.is_available():
            del given["device"]  # lm-eval's default, whatever the machine
        lm = cls(**{**given, **arg_dict})
        arg_dict.setdefault("protocol", lm.protocol_name)
        return lm

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "MGMLM":
        """The model of `"pretrained=FOLDER,protocol=pgm"`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What stands under `config` in lm-eval's results: how the scores were made."""
        return {
            **self._procedure(),
            "protocol_description": self.protocol.description,
            "truncated_requests": self.truncated,  # of this process
            "written": self.written.report(),  # of this process
            "model_num_parameters": self.model.num_parameters(),
            "fpmgm_version": version("fpmgm"),
        }

    def _procedure(self) -> dict[str, Any]:
        """Everything that the answers depend on, but for what is in the files of the model and in this package."""
        return {
            **self.source,
            "protocol": self.protocol_name,
            "mc_num": self.mc_num,
            "noise_seed": self.seed,
            "iterations": self.iterations,
            "max_length": self.max_length,
            "model_dtype": str(self.model.dtype),
            "generation": self.generation,
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Called with `--use_cache`, whose files do not say what answered: those of another procedure are refused."""
        super().set_cache_hook(cache_hook)
        answers = cache_hook.dbdict
        if answers is None:
            return
        # A folder may be trained again under its name.
        contents = [sampling_protocol(self.model, {}, None, 1, self.seed), tokenizer_contents(self.tokenizer)]
        procedure = str({**self._procedure(), "contents": digest(contents), "code": code()})
        if len(answers) == 0:
            answers["fpmgm"] = procedure
        elif answers.get("fpmgm") != procedure:
            raise ValueError(
                f"`use_cache` holds answers of {answers.get('fpmgm')}, not of {procedure}: name another file."
            )

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of text."""
        return self.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a plain text, or of a chat template's: their special tokens are placed by the protocol.

        Raises:
            `ValueError`: for `add_special_tokens=True`.
        """
        if add_special_tokens:
            raise ValueError("`add_special_tokens`=True: the protocol places BOS and EOS, leave it out.")
        return (encode_marked if self.chat else encode_text)(self.tokenizer, [string])[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the tokenizer's template; from then on, special tokens in prompts are the template's."""
        self.chat = True
        return render_chat(self.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `--apply_chat_template` asks for, as lm-eval selects it."""
        self.chat = self.chat or bool(chat_template)
        return super().chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells the prompts of several templates by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    # --- several processes ---

    def _start_processes(self, device: str | None) -> None:
        state = PartialState(cpu=device == "cpu")
        self._rank, self._world_size = state.process_index, state.num_processes
        alone = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._device = torch.device(alone if state.num_processes == 1 else state.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(processes, …) `tensor` of every process."""
        return gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """`obj` of every process, on process `dst`."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for every process."""
        PartialState().wait_for_everyone()

    # --- the likelihood ---

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score and greediness of each (context, continuation), by the protocol."""
        pairs = [(request.args, *self._encode(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Bound on the log-likelihood of each whole text, in nats.

        The text is cut into windows of the model's length, each scored by itself: the sum over its tokens, whatever
        the protocol makes of it elsewhere.
        """
        room = self.max_length - 2 * self.protocol.joint
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [[self._assemble([], ids[i : i + room]) for i in range(0, len(ids), room)] for ids in texts]
        nats: dict[Request, float] = {}
        for group in self._groups({window for text in windows for window in text}, disable_tqdm):
            nats.update(zip(group, self._nats(group), strict=True))
        return [-sum(nats[window] for window in text) for text in windows]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        items = [self._assemble(prefix, target) for _, prefix, target in requests]
        keys: dict[Request, list] = {}
        for item, (key, _, _) in zip(items, requests, strict=True):
            keys.setdefault(item, []).append(key)  # equal requests are answered once
        answers: dict[Request, tuple[float, bool]] = {}
        for group in self._groups(keys, disable_tqdm):
            for item, nats, greedy in zip(group, self._nats(group), self._greedy(group), strict=True):
                score = -nats / len(item.input_ids) if self.protocol.joint else -nats
                answers[item] = (score, greedy)
                for key in keys[item]:
                    self.cache_hook.add_partial("loglikelihood", key, answers[item])
        return [answers[item] for item in items]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        apart = self._encode_prompt(context), self._encode_behind(context, continuation)
        if self.protocol.joint or context == "":
            return apart
        prefix, target = self._encode_pair(context, continuation)
        return (prefix, target) if target else apart  # together, all of the continuation may melt into the context

    def _encode_behind(self, context: str, continuation: str) -> list[int]:
        """Ids of a continuation by itself, without the space that tokenizers such as Llama's put before a text: behind
        a context it is no beginning of one."""
        line, behind = self.tok_encode("\n"), self.tok_encode("\n" + continuation)
        if context == "" or behind[: len(line)] != line:
            return self.tok_encode(continuation)
        return behind[len(line) :]

    def _encode_prompt(self, context: str) -> list[int]:
        """Ids of a context; a BOS that a chat template wrote is left to the protocol that has its own."""
        ids = self.tok_encode(context)
        return ids[1:] if self.protocol.joint and ids[:1] == [self.begin] else ids

    def _assemble(self, prefix: list[int], target: list[int]) -> Request:
        if self.denoiser.mask_token_id in (*prefix, *target):
            raise ValueError(f"a request holds the mask id {self.denoiser.mask_token_id}: a mask is no text.")
        item = assemble(prefix, target, self.protocol, self.max_length, self.begin, self.end)
        whole = len(prefix) + len(target) + 2 * self.protocol.joint
        self._count_truncated(len(item.input_ids) < whole)
        return item

    def _count_truncated(self, truncated: bool) -> None:
        if truncated and self.truncated == 0:
            logger.warning(
                f"Some inputs are longer than `max_length`={self.max_length}: they are cut off on the left. Their "
                "number is `truncated_requests` in the results."
            )
        self.truncated += truncated

    def _groups(self, items: Iterable[Request], disable_tqdm: bool) -> Iterator[list[Request]]:
        """`batch_size` requests at a time, the longest first, so that those of similar length share a batch."""
        ordered = sorted(items, key=lambda item: (-len(item.input_ids), item))
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(ordered), desc=f"likelihood ({self.protocol_name})", disable=hidden) as bar:
            for first in range(0, len(ordered), self.batch_size):
                group = ordered[first : first + self.batch_size]
                yield group
                bar.update(len(group))

    def _nats(self, group: list[Request]) -> list[float]:
        """The bound on −log-likelihood of each request: the mean over its draws."""
        blocks = (self._block(number, item) for number, item in enumerate(group))
        totals = weighted_sums(self.denoiser, blocks, self.batch_size, len(group))
        if not all(map(isfinite, totals)):
            raise ValueError(
                "a score is not finite: check the checkpoint with `all(p.isfinite().all() for p in "
                "model.parameters())`."
            )
        return [total / self.mc_num for total in totals]

    def _block(self, number: int, item: Request) -> Block:
        """The masked copies of a request; their noise depends on the seed and the request alone."""
        length = len(item.input_ids)
        first, last = (0, length) if self.protocol.joint else (item.start, item.stop)
        noise = stream_generator(self.seed, self.protocol_name, *item)
        draws = self.protocol.draws(last - first, self.mc_num, noise)
        draws = thinned(draws, self.model.config.time_conditioning)
        masked = torch.zeros(len(draws.masked), length, dtype=torch.bool)
        masked[:, first:last] = draws.masked
        return Block(number, torch.tensor(item.input_ids), masked, draws.weights, draws.times)

    def _greedy(self, group: list[Request]) -> list[bool]:
        """Whether greedy decoding writes each request's target."""
        blocks = []
        for number, item in enumerate(group):
            masked = torch.zeros(1, len(item.input_ids), dtype=torch.bool)
            masked[:, item.start : item.stop] = True
            blocks.append(Block(number, torch.tensor(item.input_ids), masked, torch.ones(1), torch.ones(1)))
        return greedy_matches(self.denoiser, collate(blocks), self.protocol.greedy_at_once).tolist()

    # --- text ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context: `generate` fills `max_gen_toks` masks after it, cut at the end of text and
        the stop strings.

        Any argument of `generate` can be a `--gen_kwargs`; without `do_sample` the most likely tokens are taken.
        """
        jobs, seen = [], Counter()
        for number, request in enumerate(requests):
            seen[repr(request.args)] += 1  # a repeat draws anew
            jobs.append(self._job(number, *request.args, seen[repr(request.args)]))
        jobs.sort(key=lambda job: (job.batched_with, -len(job.prompt)))
        texts = [""] * len(requests)
        with tqdm(total=len(jobs), desc="generation", disable=disable_tqdm or self.rank != 0) as bar:
            for _, alike in groupby(jobs, key=lambda job: job.batched_with):
                alike = list(alike)
                for first in range(0, len(alike), self.batch_size):
                    group = alike[first : first + self.batch_size]
                    for job, text in zip(group, write(self.model, self.tokenizer, group, self.written), strict=True):
                        texts[job.number] = text
                        self.cache_hook.add_partial("generate_until", requests[job.number].args, text)
                    bar.update(len(group))
        return texts

    def _job(self, number: int, context: str, gen_kwargs: dict[str, Any], repeat: int) -> Job:
        options = normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=min(256, self.max_length // 2))
        if "seed" in options:
            raise ValueError(
                f"`seed`={options['seed']} is no `--gen_kwargs` but one of `--model_args`: give it there."
            )
        until = [stop for stop in options.pop("until") if stop]  # lm-eval's `until: null` is a list of `None`
        new_tokens, sample = options.pop("max_gen_toks"), options.pop("do_sample")
        options["temperature"] = options.get("temperature", 1.0) if sample else 0.0
        options = _fitting(options)
        begin = [self.begin] if self.protocol.joint else []
        room = self.max_length - len(begin) - new_tokens
        if room < 1:
            raise ValueError(
                f"`max_gen_toks`={new_tokens} leaves no room for a prompt in `max_length`={self.max_length}: pass a "
                "smaller one, such as `--gen_kwargs max_gen_toks=32`."
            )
        prompt = self._encode_prompt(context)
        self._count_truncated(len(prompt) > room)
        seed = stream_generator(self.seed, "generate_until", context, repeat).initial_seed()
        return Job(number, begin + prompt[-room:], new_tokens, until, {**self.generation, **options}, seed)


def _fitting(options: dict[str, Any]) -> dict[str, Any]:
    """`options` without what lm-eval's own tasks say beside greedy decoding and `generate` would refuse: what cuts a
    distribution that nothing is drawn from, and one beam."""
    idle = {name: options[name] for name in ("top_k", "top_p") if name in options and options["temperature"] == 0}
    if idle:
        logger.warning_once(f"{idle} is left out: without `do_sample=true` the most likely tokens are taken.")
    return {k: v for k, v in options.items() if k not in idle and (k, v) != ("num_beams", 1)}
