# SPDX-License-Identifier: Apache-2.0
"""A page to look at models with: a text reveals itself, two models side by side under one budget; pictures too.

    fpmgm-demo --model org/fp-mdlm org/mdlm
    fpmgm-demo --model outputs/fp_mdlm --images org/fp-maskgit --port 7860

On a hub Space, `app.py` is two lines: `from fpmgm.demo import build` and `build(["org/fp-mdlm"]).launch()`.
"""

import functools
import html
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the demonstration needs Gradio: pip install 'fpmgm[demo]'") from error

import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from .command_line import ModelName, parse_arguments
from .models.budget import step_costs
from .models.ledger import GenerationStep
from .models.prompt import encode_prompt
from .models.reuse import REUSE_STATES, REUSES
from .models.text_input import read_tokenizer
from .pictures import reveal_frames
from .pipeline_fpmaskgit import FPMaskGITPipeline
from .reveal_html import STYLE, WORDS, draw_facts, draw_legend, draw_residuals, draw_tokens, tokens_of


MOST_TOKENS = 1024
EXAMPLES = ["", "Once upon a time <|mask|*40>", "The <|mask|*8> said: <|mask|*12>"]
NONE = "(none)"
TITLE = "# Revealed step by step\nA fixed-point model runs one shared block at every step, until it is at rest."


@dataclass
class DemoArguments:
    """What to show, and where."""

    model: list[ModelName] = field(metadata={"help": "Text models to choose from: folders or hub names."})
    images: ModelName | None = field(default=None, metadata={"help": "An image pipeline; null: no tab for images."})
    only_these: bool = field(default=False, metadata={"help": "Whether visitors may not name other models."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: all."})
    port: int | None = field(default=None, metadata={"help": "Port; null: the first free one from 7860."})


def main(argv: list[str] | None = None) -> None:
    """Build the page and serve it until it is interrupted."""
    (args,) = parse_arguments((DemoArguments,), __doc__, argv)
    read(args.model[0])  # before the first visitor waits for it
    page = build(args.model, args.images, args.only_these)
    page.queue().launch(server_name=args.host, server_port=args.port)


# --- the run ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def read(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub name; no code of theirs runs."""
    return AutoModel.from_pretrained(name).eval(), read_tokenizer(name)


@functools.lru_cache(maxsize=1)
def read_pipeline(name: str) -> FPMaskGITPipeline:
    """The image pipeline of a folder or hub name."""
    return FPMaskGITPipeline.from_pretrained(name)


def steps_of(generate: Callable[..., Any]) -> Iterator[GenerationStep]:
    """The steps of `generate(callback=…)`, as they are made; its exceptions are raised here.

    Whoever stops listening stops the run.
    """
    made, gone = queue.Queue(), threading.Event()

    def callback(step: GenerationStep) -> None:
        if gone.is_set():
            raise InterruptedError("nobody looks any more")
        made.put(step)

    def run() -> None:
        try:
            generate(callback=callback)
            made.put(None)
        except Exception as error:  # told to whoever listens
            made.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        gone.set()


def reveal(name: str, prompt: str, length: int | None, **options: Any) -> Iterator[tuple[str, str, str]]:
    """Text, facts and residuals as HTML: before the first step, and after each.

    Args:
        name (`str`): Folder or hub name of the model.
        prompt (`str`): Text with blanks, `<|mask|*20>`; empty: the whole text is written.
        length (`int`, *optional*): Tokens of a text without a prompt. `None`: the model's longest.
        options: Arguments of `generate`.

    Raises:
        `ValueError`: as `generate` does.
    """
    model, tokenizer = read(name)
    mask, budget = model.config.mask_token_id, options["budget"]
    ids = encode_prompt(tokenizer, prompt, mask) if prompt.strip() else None
    previous = torch.full((length or model.config.max_position_embeddings,), mask) if ids is None else ids[0]
    given = previous != mask
    if given.all():
        raise ValueError(f"`prompt`={prompt!r} has no blank: write <|mask|*20> where 20 tokens are wanted.")
    yield draw_tokens(tokens_of(tokenizer, previous, previous, given, mask)), "", draw_residuals([], budget)
    arguments = {"input_ids": ids} if ids is not None else {"length": length}
    if model.config.is_looped:  # it has no reuse, whatever the page says for the model beside it
        options["reuse"] = "none"
    steps = steps_of(functools.partial(model.generate, **arguments, **options))
    for step, facts, residuals in told(steps, model.config, budget):
        tokens = tokens_of(tokenizer, previous, step.sequences[0].cpu(), given, mask)
        previous = step.sequences[0].cpu()
        yield draw_tokens(tokens), facts, residuals


def told(steps: Iterator[GenerationStep], config: Any, budget: int) -> Iterator[tuple[GenerationStep, str, str]]:
    """Each step, its facts and the residuals so far as HTML, of the first sequence."""
    solves, spent = [], 0
    for step in steps:
        residuals = [] if step.residuals is None else step.residuals[:, 0].tolist()
        solves.append((spent + config.num_pre_layers, residuals))
        spent += step_costs(config, [len(residuals)])[0]
        masked = int((step.sequences[0] == config.mask_token_id).sum())
        yield step, draw_facts(step.step + 1, step.num_steps, spent, budget, masked), draw_residuals(solves, budget)


# --- the page --------------------------------------------------------------------------------------------------------


def as_shown(error: Exception) -> gr.Error:
    """The library's own message on the page, where nothing of it is taken for HTML."""
    return gr.Error(html.escape(str(error)), print_exception=False)


def write(
    first: str,
    second: str | None,
    prompt: str,
    length: int,
    budget: int,
    num_steps: int,
    reuse: str,
    temperature: float,
    order: str,
    seed: int,
    pause: float,
) -> Iterator[tuple[str, ...]]:
    """Text, facts and residuals of two models, or of one, after each step."""
    options = {"budget": budget, "num_steps": num_steps or None, "reuse": reuse, "order": order}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"temperature": temperature, "seed": int(seed)}
    names = [name for name in (first, second) if name and name != NONE]
    try:
        runs = [reveal(name, prompt, int(length) or None, **options) for name in names]
        shown = [("", "", "")] * 2
        for frames in itertools.zip_longest(*runs):
            shown = [new or old for new, old in zip([*frames, None][:2], shown, strict=False)]
            yield (*shown[0], *shown[1])
            time.sleep(pause)
    except (ValueError, OSError) as error:
        raise as_shown(error) from error


def draw(
    name: str, class_name: str, budget: int, guidance_scale: float, seed: int, pause: float
) -> Iterator[tuple[Any, str, str]]:
    """The picture, facts and residuals after each step."""
    try:
        pipeline = read_pipeline(name)
        options = {"budget": int(budget), "guidance_scale": guidance_scale, "seed": int(seed), "output_type": "pt"}
        steps = steps_of(functools.partial(pipeline, [class_name], **options))
        for step, facts, residuals in told(steps, pipeline.model.config, options["budget"]):
            yield reveal_frames([step], pipeline.tokenizer)[0], facts, residuals
            time.sleep(pause)
    except (ValueError, OSError) as error:
        raise as_shown(error) from error


def build(models: list[str], images: str | None = None, only_these: bool = False) -> gr.Blocks:
    """The page, ready for `launch()`.

    Args:
        models (`list[str]`): Folders or hub names of text models; the first two are shown first.
        images (`str`, *optional*): Folder or hub name of an image pipeline. `None`: no tab for images.
        only_these (`bool`, defaults to `False`): Whether visitors may not name other models. For a page that others
            reach, `True`.

    Returns:
        `gradio.Blocks`.
    """
    with gr.Blocks(title="fpmgm", analytics_enabled=False) as page:
        gr.HTML(f"<style>{STYLE}</style>", padding=False)
        gr.Markdown(TITLE)
        with gr.Tab("Text"):
            text_tab(models, only_these)
        if images is not None:
            with gr.Tab("Images"):
                image_tab(images)
    return page


def text_tab(models: list[str], only_these: bool) -> None:
    """Prompt and settings, and what two models make of them."""
    any_name = not only_these
    shown_first = read(models[0])[0]
    orders = list(shown_first.orders)
    with gr.Row():
        named = {"allow_custom_value": any_name, "min_width": 280}  # in a narrow window one below the other
        first = gr.Dropdown(models, value=models[0], label="Model", **named)
        other = models[1] if len(models) > 1 else NONE
        second = gr.Dropdown([NONE, *models], value=other, label="Beside it", **named)
    prompt = gr.Textbox(
        label="Prompt", lines=2, max_length=4000, placeholder="Empty: the whole text. <|mask|*20> is 20 blanks."
    )
    with gr.Row():
        budget = gr.Slider(12, 768, 96, step=12, label="Budget: block evaluations")
        temperature = gr.Slider(0, 1.5, shown_first.generation_config.temperature, step=0.05, label="Temperature")
        reuse = gr.Dropdown(
            list(REUSES), value=shown_first.generation_config.reuse, label="Reuse of the last solution"
        )
    with gr.Accordion("More", open=False), gr.Row():
        num_steps = gr.Slider(0, 256, 0, step=1, label="Steps (0: from the budget)")
        length = gr.Slider(0, MOST_TOKENS, 0, step=1, label="Tokens without a prompt (0: the longest)")
        order = gr.Dropdown(orders, value=shown_first.generation_config.order or orders[0], label="Order of revealing")
        seed = gr.Number(0, label="Seed", precision=0)
        pause = gr.Slider(0, 1, 0.15, step=0.05, label="Seconds a step is shown")
    with gr.Row():
        go = gr.Button("Write", variant="primary")
        stop = gr.Button("Stop")
    outputs = []
    with gr.Row():
        for _ in range(2):
            with gr.Column(min_width=320):
                outputs += [gr.HTML(), gr.HTML(), gr.HTML()]
    gr.HTML(draw_legend())
    gr.Examples([[example] for example in EXAMPLES if example], inputs=[prompt])
    inputs = [first, second, prompt, length, budget, num_steps, reuse, temperature, order, seed, pause]
    # A click while a text is being written counts when it is written.
    options = {"show_progress": "hidden", "trigger_mode": "always_last"}
    running = [event(write, inputs, outputs, **options) for event in (go.click, prompt.submit)]
    stop.click(None, cancels=running)


def image_tab(name: str) -> None:
    """Class and settings, and the picture."""
    names = list(read_pipeline(name).model.config.id2label.values())
    with gr.Row():
        label = gr.Dropdown(names, value=names[0], label="Class")
        budget = gr.Slider(12, 384, 96, step=12, label="Budget: block evaluations")
        guidance = gr.Slider(1, 5, 2, step=0.1, label="Guidance")
        seed = gr.Number(0, label="Seed", precision=0)
        pause = gr.Slider(0, 1, 0.15, step=0.05, label="Seconds a step is shown")
    go = gr.Button("Draw", variant="primary")
    with gr.Row():
        picture = gr.Image(label="Grey: not yet revealed", format="png", min_width=320)
        with gr.Column(min_width=320):
            facts, residuals = gr.HTML(), gr.HTML()
    inputs = [gr.State(name), label, budget, guidance, seed, pause]
    go.click(draw, inputs, [picture, facts, residuals], show_progress="hidden")


assert set(REUSE_STATES) < set(WORDS), "every state has a colour"

if __name__ == "__main__":
    main()
