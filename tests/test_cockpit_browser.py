"""The cockpit in a real JupyterLab in a real browser: what a learner clicks, and what the kernel then holds.

Skipped where there is no Chromium. Screenshots stay in outputs/screenshots.
"""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from jupyter_client import BlockingKernelClient

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser driver is not there: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

SLOW = 180  # seconds that a busy machine may take to start things
SHOTS = Path(__file__).resolve().parent.parent / "outputs" / "screenshots"
QUIET = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
WATCH_CLICK = """() => {
    window.answered = 0;
    const line = [...document.querySelectorAll('.widget-html-content')].find(e => e.querySelector('b'));
    document.addEventListener('click', () => {
        const start = performance.now();
        const watch = setInterval(() => {
            if (/paus/.test(line.innerText)) { window.answered = performance.now() - start; clearInterval(watch); }
        }, 2);
    }, {once: true, capture: true});
}"""
CELLS = [
    """import sys, threading
sys.path.insert(0, {root!r})
import torch
import dcgan_utils as du
torch.set_num_threads(1)  # the browser needs the other core
images, labels = du.load_images()
gan = du.FastDCGAN(ngf=16, ndf=16, batch_size=64, lr_D=0.00123456)
config = gan.config
cockpit = du.Cockpit(gan, data=(images[:3200], labels[:3200]))
def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])""",
    "cockpit",
]


class Lab:
    """A JupyterLab on a free port with one open notebook, the page that shows it, and a line to its kernel."""

    def __init__(self, folder, root, app="lab"):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.format(root=str(root))) for c in CELLS])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / "cockpit.ipynb")
        quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
        (folder / "config" / "labconfig").mkdir(parents=True)
        (folder / "config" / "labconfig" / "page_config.json").write_text(json.dumps(quiet))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.runtime, self.app, self.token = folder, folder / "runtime", app, "for-this-test"
        places = {"JUPYTER_CONFIG_DIR": folder / "config", "JUPYTER_RUNTIME_DIR": self.runtime, "HOME": folder}
        flags = [f"--ServerApp.port={self.port}", f"--IdentityProvider.token={self.token}", "--allow-root"]
        flags += ["--no-browser", "--ServerApp.ip=127.0.0.1", "--LabApp.expose_app_in_browser=True"]
        flags += ["--JupyterNotebookApp.expose_app_in_browser=True"]
        self.server = subprocess.Popen(
            [sys.executable, "-m", {"lab": "jupyterlab"}.get(app, app), *flags, f"--ServerApp.root_dir={folder}"],
            env=os.environ | {name: str(path) for name, path in places.items()},
            stdout=(folder / "server.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        try:
            self.wait_for(lambda: self.ask("status"), SLOW, "an answer of the server")
        except AssertionError:
            self.close()
            raise

    def ask(self, what):
        """Return what the server's REST interface says, None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/{what}?token={self.token}") as answer:
                return json.load(answer)
        except OSError:
            return None

    def wait_for(self, condition, seconds=60, what="the condition"):
        """Return the condition's first true value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.1)
        raise AssertionError(f"{what} did not come true within {seconds} s; {self.folder / 'server.log'}")

    def open(self, page):
        """Open the notebook, run all of it and connect to its kernel."""
        self.page, self.errors = page, []
        page.on("console", self.note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        place = "lab/tree" if self.app == "lab" else "notebooks"
        page.goto(f"http://127.0.0.1:{self.port}/{place}/cockpit.ipynb?token={self.token}")
        page.wait_for_function("() => window.jupyterapp !== undefined", timeout=1000 * SLOW)
        page.locator(".jp-Notebook").wait_for(timeout=1000 * SLOW)
        self.session = self.wait_for(lambda: self.ask("sessions"), SLOW, "a kernel")[0]
        self.run_all()

    def note(self, message):
        """Keep an error of the browser's console; that there is no language server is none of ours."""
        place = message.location.get("url", "")
        if message.type == "error" and "/lsp/" not in place:
            self.errors.append(f"{message.text} {place}")

    def run_all(self):
        """Run all cells and wait for the cockpit."""
        idle = "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        self.page.wait_for_function(idle, timeout=1000 * SLOW)
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.get_by_role("button", name="Play").wait_for(timeout=1000 * SLOW)
        self.kernel = BlockingKernelClient(
            connection_file=str(self.runtime / f"kernel-{self.session['kernel']['id']}.json")
        )
        self.kernel.load_connection_file()
        self.kernel.start_channels()

    def value(self, expression):
        """Return what an expression is worth in the kernel."""
        request = self.kernel.execute("", user_expressions={"x": expression}, store_history=False)
        while True:
            reply = self.kernel.get_shell_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == request:
                answer = reply["content"]["user_expressions"]["x"]
                assert answer["status"] == "ok", answer
                return eval(answer["data"]["text/plain"], {"__builtins__": {}})

    def click(self, name):
        """Click a button of the cockpit."""
        self.page.get_by_role("button", name=name).click()

    def says(self, text, seconds=60):
        """Wait until the cockpit's status line holds a text, and return the line."""
        line = self.page.locator(".widget-html-content", has=self.page.locator("b")).first
        self.wait_for(lambda: text in line.inner_text(), seconds, f"{text!r} in the status line")
        return line.inner_text()

    def epoch(self):
        """Return the cockpit's epoch counter."""
        return float(re.search(r"epoch ([\d.]+)", self.says("epoch")).group(1))

    def picture(self):
        """Return the address of the picture that the browser shows; each new picture has a new one."""
        return self.page.locator("img.widget-image").get_attribute("src")

    def slider(self, label, key, times=1):
        """Put the focus on a slider and press a key, as one does without a mouse."""
        row = self.page.locator(".widget-slider", has=self.page.get_by_text(label, exact=True))
        row.locator(".noUi-handle").focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def box(self, label, key):
        """Put the focus on a box for a number and press a key."""
        row = self.page.locator(".widget-text", has=self.page.get_by_text(label, exact=True))
        row.locator("input").focus()
        self.page.keyboard.press(key)

    def close(self):
        """End the server; its kernel ends with it."""
        self.server.terminate()
        try:
            self.server.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.server.kill()

    def shot(self, name):
        """Keep a picture of the page."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{self.app}_{name}.png")


def open_browser(driver, profile, height=1150):
    """Return Chromium with one empty page, 1280 pixels wide."""
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    size = {"width": 1280, "height": height}
    return driver.chromium.launch_persistent_context(
        profile, executable_path=CHROMIUM, args=QUIET.split() + sandbox, viewport=size
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory, root):
    """Return a JupyterLab with the cockpit on show; DCGAN_BROWSER_APP=notebook takes Notebook 7 instead."""
    lab = Lab(tmp_path_factory.mktemp("lab"), root, os.environ.get("DCGAN_BROWSER_APP", "lab"))
    try:
        with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as profile:
            context = open_browser(driver, profile)
            try:
                lab.open(context.pages[0])
                yield lab
            finally:
                lab.shot("last")
                context.close()
    finally:
        lab.close()


def test_a_learner_plays_steps_steers_breaks_and_looks_back(lab):
    """Do it in the order of a lesson; each part goes on from the one before."""
    lab.says("ready")
    first = lab.picture()
    assert lab.value("(gan.config == config, cockpit.controls['lr_D'].value)") == (True, 0.00123456)  # showing is all
    lab.click("Play")
    lab.wait_for(lambda: lab.epoch() > 0.5 and lab.picture() != first, 60, "epoch counter and picture")
    lab.shot("playing")

    answers = []  # what a click takes while it trains, measured in the browser
    for _ in range(5):
        lab.page.evaluate(WATCH_CLICK)
        lab.click("Pause")
        answers.append(lab.wait_for(lambda: lab.page.evaluate("() => window.answered"), 60, "an answer"))
        lab.says("paused")
        lab.click("Play")
        lab.says("playing")
        lab.page.wait_for_timeout(700)
    print(f"a click answers after {', '.join(f'{ms:.0f}' for ms in answers)} ms")
    assert statistics.median(answers) <= 300
    lab.click("Pause")
    lab.says("paused")
    assert lab.value("cockpit.playing") is False
    before = lab.epoch()
    lab.page.wait_for_timeout(500)
    assert lab.epoch() == before

    lab.value("globals().update(g=weights(gan.generator), d=weights(gan.discriminator), s=gan.step)")
    lab.click("Step D")
    lab.wait_for(lambda: lab.value("gan.step == s + 1 and not cockpit.playing"), 60, "one step")
    assert lab.value("(torch.equal(g, weights(gan.generator)), torch.equal(d, weights(gan.discriminator)))") == (
        True,
        False,
    )

    lab.box("G steps (0 freezes)", "ArrowUp")
    lab.wait_for(lambda: lab.value("gan.config.g_steps") == 2, 60, "the box")
    lab.box("G steps (0 freezes)", "ArrowDown")
    lab.wait_for(lambda: lab.value("gan.config == config"), 60, "everything as it was")

    lab.click("Play")
    lab.wait_for(lambda: lab.value("gan.history.last()['pixel_std_ratio']") > 0.5, 60, "digits that differ")
    lab.page.get_by_label("scenario").select_option("collapse")
    lab.wait_for(lambda: lab.value("gan.history.last()['pixel_std_ratio']") < 0.4, 60, "a collapse")
    lab.says("🔴 act")
    lab.click("Pause")
    lab.says("paused")
    assert lab.page.get_by_text("Health after epoch").inner_text().count("act") == 1
    lab.shot("collapsed")

    newest = lab.picture()
    lab.slider("look back", "ArrowLeft", times=4)
    lab.says("looking back at iteration")
    assert lab.picture() != newest
    lab.shot("looking_back")

    text = lab.value("cockpit.text")
    assert "lr_G=" in text
    assert lab.value(
        "all(torch.equal(p, q) for p, q in zip(gan.generator.parameters(), "
        "du.GAN.replay(cockpit.text, (images, labels)).generator.parameters()))"
    )


def test_a_restart_leaves_nothing_behind(lab):
    lab.click("Play")
    lab.says("playing")
    lab.page.get_by_role("menuitem", name="Kernel", exact=True).click()
    lab.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Restart Kernel…$")).click()
    lab.page.get_by_role("button", name="Confirm Kernel Restart").click()
    lab.page.wait_for_timeout(1500)
    lab.run_all()
    lab.says("ready")
    assert lab.value("(gan.step, cockpit.playing, threading.current_thread() is threading.main_thread())") == (
        0,
        False,
        True,
    )
    lab.click("Step both")
    lab.wait_for(lambda: lab.value("gan.step") == 1, 60, "a step after the restart")
    assert lab.errors == []
