# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a run, what it says of mistakes, and a page that a browser shows."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from fpmgm import FPMaskGITPipeline
from fpmgm.data import train_tokenizer

from .testing_utils import tiny_image_model, tiny_image_tokenizer, tiny_model


RELEASED = Path(__file__).parents[1] / "model_cards/stories-fp-mdlm"
EVIL = "<img src=x onerror=alert(1)>"
BLANK = "getComputedStyle(document.querySelector('.fp-masked') ?? document.body).color == 'rgba(0, 0, 0, 0)'"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


gradio = pytest.importorskip("gradio", reason="needs `pip install 'fpmgm[demo]'`: make test-demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the cat sat on the mat, and the other cat sat on the other mat"] * 4, 270)
    model = tiny_model(
        scale=0.05, vocab_size=270, mask_token_id=269, max_position_embeddings=96, input_injection="diagonal"
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    names = {0: "tench", 1: EVIL, 2: "gas pump"}
    FPMaskGITPipeline(tiny_image_model(num_classes=None, id2label=names), tiny_image_tokenizer()).save_pretrained(path)
    return str(path)


def test_a_text_is_revealed_step_by_step_within_its_budget(folder):
    from fpmgm.demo import reveal

    frames = list(reveal(folder, "the cat <|mask|*20> mat", None, budget=48, seed=0))
    masked = [text.count("fp-masked") for text, _, _ in frames]
    assert masked[0] == 20 and masked[-1] == 0 and masked == sorted(masked, reverse=True)
    assert "fp-changed" in frames[1][0] and "fp-unchanged" in frames[-1][0] and 'fp-given">the' in frames[-1][0]
    spent = [int(re.search(r"(\d+) of 48 block", facts)[1]) for _, facts, _ in frames[1:]]
    assert spent == sorted(spent) and spent[-1] == 48
    assert frames[-1][2].count("polyline") == len(frames) - 1


def test_a_looped_model_is_shown_beside_one_that_reuses(folder, tmp_path):
    from fpmgm.demo import write

    looped = tiny_model(scale=0.05, vocab_size=270, mask_token_id=269, input_injection="none")
    looped.save_pretrained(tmp_path)
    shutil.copyfile(f"{folder}/tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(f"{folder}/tokenizer_config.json", tmp_path / "tokenizer_config.json")
    *_, last = write(folder, str(tmp_path), "", 8, 24, 0, "3sr", 1.0, "ancestral", 0, 0)
    assert all("fp-masked" not in last[place] for place in (0, 3))


def test_a_picture_is_revealed_step_by_step_within_its_budget(pictures):
    from fpmgm.demo import draw

    frames = list(draw(pictures, EVIL, 36, 2.0, 0, pause=0))
    told = [[int(number) for number in re.findall(r"\d+", facts)] for _, facts, _ in frames]
    masked, spent = [numbers[-1] for numbers in told], [numbers[2] for numbers in told]
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0 and spent[-1] == 36
    assert len({picture.tobytes() for picture, _, _ in frames}) == frames[-1][2].count("polyline") == len(frames)


def test_the_first_text_of_a_released_model_comes_within_three_seconds():
    from fpmgm.demo import read, reveal

    began = time.process_time()
    read.cache_clear()
    frames = reveal(str(RELEASED), "", None, budget=96, seed=0)
    assert "fp-changed" not in next(frames)[0] and "fp-changed" in next(frames)[0]
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("model", "prompt", "words"),
    [(None, EVIL, "has no blank"), (None, "<|mask|*200>", "200|96"), (f"org/{EVIL}", "", "img src")],
)
def test_mistakes_show_the_librarys_own_message_and_no_html_of_the_visitors(folder, model, prompt, words):
    from fpmgm.demo import write

    with pytest.raises(gradio.Error) as error:
        list(write(model or folder, None, prompt, 0, 12, 0, "3sr", 1.0, "ancestral", 0, 0.0))
    assert re.search(words, str(error.value)) and "<img" not in str(error.value)


def test_who_leaves_ends_the_run(folder):
    from fpmgm.demo import read, steps_of

    model, _ = read(folder)
    calls = []
    model.post_layers[-1].register_forward_hook(lambda *_: calls.append(1))
    steps = steps_of(lambda callback: model.generate(num_steps=400, iterations=1, callback=callback, seed=0))
    next(steps)
    steps.close()
    time.sleep(1)
    seen = len(calls)
    time.sleep(0.5)
    assert len(calls) == seen < 400


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_two_models_a_mistake_and_a_picture(folder, pictures, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    from fpmgm.demo import build

    page_of = build([folder, folder], pictures).queue()
    _, url, _ = page_of.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    shots = Path(os.environ.get("FPMGM_SCREENSHOTS", tmp_path))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for theme, width in (("light", 1200), ("dark", 1200), ("light", 400)):
            page = browser.new_page(viewport={"width": width, "height": 1100})
            alerts = []
            page.on("dialog", lambda dialog, alerts=alerts: (alerts.append(dialog.message), dialog.dismiss()))
            page.goto(f"{url}?__theme={theme}")
            page.get_by_label("Prompt").fill(f"the cat {EVIL} <|mask|*12>")
            page.get_by_role("button", name="Write").click()
            page.wait_for_function(f"document.querySelector('.fp-changed') && {BLANK}", timeout=60_000)
            page.wait_for_function("document.querySelectorAll('.fp-masked').length == 0", timeout=60_000)
            assert page.locator(".fp-text").count() == 2 and page.locator("polyline").count() > 2
            assert EVIL in page.locator(".fp-text").first.inner_text().replace("\n", "")
            page.screenshot(path=shots / f"demo_{theme}_{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            page.get_by_label("Prompt").fill("no blanks")
            page.get_by_role("button", name="Write").click()
            page.wait_for_selector("text=has no blank", timeout=60_000)
            page.get_by_role("tab", name="Images").click()
            page.get_by_label("number input for Budget").last.fill("36")
            page.get_by_label("number input for Budget").last.press("Tab")
            page.get_by_role("button", name="Draw").click()
            page.wait_for_selector("text=36 of 36 block evaluations", timeout=60_000)
            page.screenshot(path=shots / f"images_{theme}_{width}.png", full_page=True)
            assert alerts == []
            page.close()
        browser.close()
    page_of.close()
