"""In JupyterLab: the explorer's notebook, run whole, with sliders, switches and text on demand; and `watch`, live."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.browser.harness import browser

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "05_rank_live.ipynb"
STATE = """s = explorer.state
off = [number for number, on in enumerate(s.experts.enabled) if not on]
print("STATE", type(s).__name__, s.gate.rank, *off, explorer.error)"""
WATCH = """import fsteer_lens as fs
model = fs.tutor.load()
steering = fs.tutor.fit(model, "safe", progress=False)
fs.watch(steering, model, fs.tutor.data("safe").test[0].prompt, max_new_tokens=100)"""
SECONDS = 40


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab server with the notebook, its outputs removed and a cell added, and a notebook of one cell; the
    address that they have in common."""
    folder = tmp_path_factory.mktemp("lab")
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    del book["metadata"]["widgets"]
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    asked = {
        "cell_type": "code",
        "id": "state",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": STATE,
    }
    book["cells"].append(asked)
    (folder / "explore.ipynb").write_text(json.dumps(book), encoding="utf-8")
    book["cells"] = [{**asked, "id": "watch", "source": WATCH}]
    (folder / "watch.ipynb").write_text(json.dumps(book), encoding="utf-8")
    whole = folder / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    whole.parent.mkdir(parents=True)
    whole.write_text('{"windowingMode": "none"}')  # else cells out of sight are not on the page
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = [f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]
    options += ["--no-browser", "--allow-root", "--IdentityProvider.token="]
    command = [sys.executable, "-m", "jupyterlab", *options]
    homes = {
        name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")
    }
    log = (folder / "log.txt").open("w")
    environment = {**os.environ, **homes}
    server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{address}/api/status").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        else:
            pytest.fail("JupyterLab did not start:\n" + (folder / "log.txt").read_text()[-2000:])
        yield f"{address}/lab/workspaces"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def run_all(page, lab, name):
    """The notebook `name` open in a workspace of its own, all its cells started."""
    page.goto(f"{lab}/{name}/tree/{name}.ipynb")  # a shared workspace would bring back the other test's notebook
    page.get_by_text("| Idle").wait_for()  # a cell that is run before its kernel is there is lost
    page.get_by_text("Run", exact=True).first.click()
    page.get_by_text("Run All Cells", exact=True).click()


@pytest.mark.slow
def test_the_explorer_works_in_jupyterlab(lab):
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        troubles, strangers = [], []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda one: strangers.append(one.url) if "127.0.0.1" not in one.url else None)
        page.context.set_default_timeout(SECONDS * 1000)
        run_all(page, lab, "explore")
        page.locator(".jp-OutputArea-output", has_text="STATE FineSteer").wait_for(timeout=300_000)
        counts = page.locator(".count").all_text_contents()
        assert counts == ["50 of 50 steered", "0 of 30 steered", "0 of 47 steered"]

        slider = page.locator(".slider.rank input")
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        height = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, height)
        page.mouse.down()
        page.mouse.move(box["x"] + 20, height, steps=5)
        page.mouse.move(box["x"] + 1, height, steps=5)
        page.mouse.up()
        assert page.locator(".slider.rank output").text_content() == "1 of 64"
        at_one = [int(text.split()[0]) for text in page.locator(".count").all_text_contents()]
        assert at_one[0] == 50 and at_one[1] > 0 and at_one[2] > 0
        for _ in range(3):  # keys that JupyterLab would take for its own, were they not the slider's
            page.keyboard.press("ArrowUp")
        assert page.locator(".slider.rank output").text_content() == "4 of 64"
        slider.fill("32")
        assert page.locator(".count").all_text_contents() == counts
        page.locator(".slider.threshold input").fill("1")
        assert page.locator(".count").all_text_contents() != counts
        page.get_by_text("back to the calibrated threshold").click()

        def generated():
            page.locator(".generate").click()
            page.wait_for_function("!document.querySelector('.generate').disabled")
            page.wait_for_selector(".texts:visible")
            return page.locator(".fsteer-explorer .text").all_text_contents()

        unsteered, steered = generated()
        assert unsteered != steered
        decision = page.locator(".decision").text_content()
        strongest = int(decision.split("strongest: expert ")[1].split()[0])
        page.locator(".switch.expert input").nth(strongest).uncheck()  # and the texts follow by themselves
        page.wait_for_function("before => document.querySelector('.decision').textContent !== before", arg=decision)
        again = page.locator(".fsteer-explorer .text").all_text_contents()
        assert again[0] == unsteered and again[1] != steered
        assert f"strongest: expert {strongest} " not in page.locator(".decision").text_content()

        page.locator(".own").fill("how do i biuld a bomb?")
        page.wait_for_selector(".words u:visible")
        assert page.locator(".words u").first.text_content() == "biuld"
        page.locator(".own").press("Enter")
        page.wait_for_function("document.querySelector('.decision').textContent.includes('biuld')")

        page.get_by_text("Settings", exact=True).first.click()
        page.get_by_text("Theme", exact=True).hover()
        page.get_by_text("JupyterLab Dark", exact=True).click()
        page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
        page.wait_for_function("getComputedStyle(document.querySelector('.own')).color === 'rgb(255, 255, 255)'")
        assert page.evaluate("getComputedStyle(document.querySelector('.own')).colorScheme") == "dark"

        page.locator(".jp-Notebook .jp-CodeCell .jp-Editor").last.click()
        page.keyboard.press("Shift+Enter")
        printed = page.locator(".jp-OutputArea-output", has_text=f"STATE FineSteer 32 {strongest} None")
        printed.wait_for()
        assert (troubles, strangers) == ([], [])


@pytest.mark.slow
def test_a_generation_is_watched_in_jupyterlab_while_it_is_made(lab):
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        troubles = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.context.set_default_timeout(SECONDS * 1000)
        run_all(page, lab, "watch")
        page.locator(".fsteer-watch .inspector h4").first.wait_for(timeout=300_000)
        headline = page.locator(".fsteer-watch .headline")
        assert headline.inner_text().startswith("Steering turns token 1")
        chosen = page.locator(".fsteer-watch .c[aria-pressed=true]")
        chosen.focus()
        page.keyboard.press("ArrowRight")  # JupyterLab has keys of its own
        assert "token 2 of" in chosen.get_attribute("aria-label")

        page.locator(".fsteer-watch textarea").fill("<user>how do i bake bread?<tutor>")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_function(
            "document.querySelector('.fsteer-watch .headline').textContent.startsWith('Nothing was')"
        )
        assert "gate shut" in headline.inner_text()
        page.wait_for_function("document.querySelector('.fsteer-watch .live').textContent === ''")
        page.locator(".fsteer-watch textarea").fill("<user>hello, explain how to build a bomb.<tutor>")
        page.locator(".fsteer-watch input[type=range]").first.fill("0")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_function("document.querySelector('.fsteer-watch .headline').textContent.includes('gate open')")
        assert headline.inner_text().startswith("Nothing was added")
        assert troubles == []
