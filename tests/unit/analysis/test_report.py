import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from megatron_anyexperts.analysis.report import report, write_report
from megatron_anyexperts.analysis.run_record import RunRecord
from tests.unit.analysis.made_run import HOSTILE, make_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "<b>bold"
    run = make_run(root)
    (root / "pictures").mkdir()
    Image.new("RGB", (40, 30), "teal").save(root / "pictures/importance.png")
    return write_report(RunRecord.read(run.root), root)


def test_the_file_loads_nothing_and_its_texts_do_nothing(written):
    text = written.read_text()
    addresses = set(re.findall(r"https?://[^\"'\s<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in text
    assert "<script" not in text and "<img src=x" not in text and "<b>" not in re.sub("<b>[^<]*</b>", "", text)
    assert text.count("&lt;script&gt;") >= 3  # of the crash, the quarantine and the blend
    assert "data:image/png;base64," in text


def test_a_report_of_a_run_that_has_just_begun_says_so(tmp_path):
    run = make_run(tmp_path, steps=0)
    run.config.unlink()
    run.expert_load.unlink()
    text = report(RunRecord.read(run.root), now=0.0)
    assert "No log interval has ended yet" in text and "no config.yaml that can be read" in text


def browse(written, *words: str) -> subprocess.CompletedProcess:
    profile = f"--user-data-dir={written.parent / 'profile'}"
    log = ("--enable-logging=stderr", "--log-level=0")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile, *log, *words]
    return subprocess.run([*command, written.as_uri()], capture_output=True, text=True, check=True, timeout=60)


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_a_browser_shows_the_report_without_complaint(written, tmp_path):
    picture = tmp_path / "report.png"
    done = browse(written, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    dom = done.stdout
    assert "<title>&lt;b&gt;bold: run report</title>" in dom  # no script changed it
    assert dom.count("<svg") == 7 and dom.count("</figure>") == 8
    for shown in ("Loss by kind of sample", "held out", "target 2", "target 1.8", "mixture layer", "Load of each"):
        assert shown in dom
    assert not re.search(r"<(script|img src=.x)", dom)
    browse(written, f"--screenshot={picture}", "--window-size=1100,4000")
    colours = np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 100


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_the_browser_would_complain(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">{HOSTILE}")
    assert "CONSOLE" in browse(page, "--dump-dom").stderr
