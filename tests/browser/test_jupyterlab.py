"""The explorer in JupyterLab, with a kernel: sliders, switches, text on demand, and the state back in Python."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.browser.harness import browser

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

START = """
import torch; torch.set_num_threads(1)
from fsteer_lens import fit, collect, tutor
from fsteer_lens.explorer import explore
model, told = tutor.load(), tutor.data("safe")
acts = collect(model, told.train[::4], layer=4, shift="last_prompt", batch_size=64, progress=False)
steering = fit(acts, rank=16, epochs=40)
groups = {"harmful": told.valid.prompts[::8], "general": [t.prompt for t in told.general_valid[::8]]}
explorer = explore(steering, model, groups, progress=False)
explorer
"""
STATE = """s = explorer.state
print("STATE", type(s).__name__, s.gate.rank, s.experts.enabled.index(False), explorer.error)"""
SECONDS = 40


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab server with one notebook; the notebook's address."""
    folder = tmp_path_factory.mktemp("lab")
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
        for i, source in enumerate((START.strip(), STATE))
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (folder / "explore.ipynb").write_text(json.dumps(book), encoding="utf-8")
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
    environment = {**os.environ, **homes, "HF_HUB_OFFLINE": "1"}
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
        yield f"{address}/lab/tree/explore.ipynb"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.mark.slow
def test_the_explorer_works_in_jupyterlab(lab):
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        troubles, strangers = [], []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda one: strangers.append(one.url) if "127.0.0.1" not in one.url else None)
        page.context.set_default_timeout(SECONDS * 1000)
        page.goto(lab)
        page.get_by_text("| Idle").wait_for()  # a cell that is run before its kernel is there is lost
        page.locator(".jp-Notebook .jp-Cell .jp-Editor").first.click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_selector(".fsteer-explorer .count")
        counts = page.locator(".count").all_text_contents()
        assert counts[0].endswith("steered") and not counts[0].startswith("0 ")

        slider = page.locator(".slider.rank input")
        slider.focus()
        for _ in range(3):  # keys that JupyterLab would take for its own, were they not the slider's
            page.keyboard.press("ArrowDown")
        assert page.locator(".slider.rank output").text_content().startswith("13 of")
        page.locator(".slider.threshold input").fill("1")
        assert page.locator(".count").all_text_contents() != counts
        page.get_by_text("back to the calibrated threshold").click()
        page.locator(".switch.expert input").nth(2).uncheck()

        page.locator(".generate").click()
        page.wait_for_selector(".texts:visible")
        unsteered, steered = page.locator(".text").all_text_contents()
        assert unsteered != steered
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

        page.locator(".jp-Notebook .jp-CodeCell .jp-Editor").nth(1).click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_function("document.body.textContent.includes('STATE FineSteer')")
        printed = page.locator(".jp-OutputArea-output", has_text="STATE").last.text_content()
        assert printed.split() == ["STATE", "FineSteer", "13", "2", "None"]
        assert (troubles, strangers) == ([], [])
