"""The widget of `watch` on a page without a kernel: it asks, follows what comes, and keeps what it showed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fsteer_lens as fs
from tests.browser.chromium import opened
from tests.browser.harness import browser, page_of

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def path(
    tmp_path_factory: pytest.TempPathFactory, hooked: Any, steering: fs.FineSteer, prompts: list[str], chromium: Any
) -> Path:
    target = tmp_path_factory.mktemp("watch") / "watch.html"
    target.write_text(page_of(fs.watch(steering, hooked, prompts[0], max_new_tokens=6)), encoding="utf-8")
    return target


def test_it_asks_and_follows_what_comes(chromium: Any, path: Path) -> None:
    with opened(chromium, path) as (page, heard):
        page.wait_for_selector(".fsteer-watch .fsteer-replay .inspector h4")
        page.get_by_label("prompt").first.fill("how do i bake bread?")
        page.locator("input[type=range]").first.fill("2")
        page.get_by_role("button", name="Generate").click()
        (sent,) = page.evaluate("shown.sent")
        assert sent["kind"] == "generate" and sent["prompt"] == "how do i bake bread?" and sent["strength"] == 2
        page.evaluate("shown.model.set('live', {status: 'running', text: '<img src=x onerror=alert(1)> knead'})")
        assert page.locator(".live").inner_text() == "<img src=x onerror=alert(1)> knead"
        assert page.get_by_role("button", name="Generate").is_disabled()
        page.get_by_role("button", name="Stop").click()
        assert page.evaluate("shown.sent.at(-1).kind") == "stop"
        view = page.evaluate("shown.model.get('view')").replace('<p class="headline">', '<p class="headline">Another: ')
        page.evaluate("view => { shown.model.set('view', view); shown.model.set('live', {status: 'done'}) }", view)
        assert page.locator(".fsteer-replay .headline").inner_text().startswith("Another: ")
        page.locator(".fsteer-replay .c.a").nth(1).click()
        assert "Token 2 of" in page.locator(".fsteer-replay .say").inner_text()
        assert heard.errors == [] and heard.outside == []


def test_without_a_kernel_it_says_so_and_keeps_the_view(chromium: Any, path: Path) -> None:
    with opened(chromium, path) as (page, heard):
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("No kernel answers").wait_for()
        assert page.get_by_role("button", name="Generate").is_enabled()
        assert page.locator(".fsteer-replay .c").count() > 10
        page.evaluate("shown.model.set('live', {status: 'failed', text: 'the prompt is too long'})")
        assert page.locator(".live").inner_text() == "the prompt is too long"
        assert heard.errors == []
