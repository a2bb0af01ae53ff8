"""The page of a run: what it says, that it is small, that a browser shows it without a network."""
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import cli
import page
import run
import train
from tests.helpers import one_line, run_train

CONFIG = dict(data="", res=64, text="", model="laptop", steps=4000, batch=16)


def line(step, loss, **more):
    return dict(step=step, loss=loss, norm=1.0, lr=1e-3, skipped=0, images_per_second=80.0,
                seconds=step * .2) | more


def report(step, losses):
    return dict(step=step, loss_by_noise_level=losses)


def write_log(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(part) + "\n" for part in lines))
    return folder


def charts(text):
    """The inline SVGs, parsed: each a list of (points, colour)."""
    found = re.findall(r"<svg.*?</svg>", text, re.S)
    return [[([tuple(map(float, point.split(","))) for point in line.get("points").split()],
              line.get("stroke"))
             for line in ElementTree.fromstring(svg).iter("polyline")] for svg in found]


def test_a_curve_is_the_mean_of_each_stretch_and_has_32_points_for_a_doubling():
    steps = np.arange(1, 4097)
    values = np.sin(steps) + 2
    x, y = page.thinned(steps.tolist(), values.tolist())
    for octave in range(7, 12):             # before, some stretches have no step
        assert sum(2**octave <= step < 2**(octave + 1) for step in x) == 32
    edges = [2**(11 + k / 32) for k in range(33)]
    expected = [values[(steps >= low) & (steps < high)].mean() for low, high in
                zip(edges, edges[1:])]
    assert np.allclose(y[-33:-1], expected)
    assert page.thinned([0, 1, 2, 3], [1.0, None, math.nan, 5.0]) == ([3], [5.0])
    assert page.thinned([], []) == ([], [])


def test_points_lie_on_logarithmic_axes():
    curve = ([1, 10, 100], [1.0, .1, .001])
    ((points, _),), = charts(page.chart({"loss": curve}, "loss", "falls"))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=.2)
    assert 2 * (y1 - y0) == pytest.approx(y2 - y1, abs=.3) and y1 > y0      # SVG: down is more
    ((longer, _),), = charts(page.chart({"loss": curve}, "loss", "falls", 1000))
    assert longer[0][0] == x0 and 3 * (longer[1][0] - x0) == pytest.approx(x2 - x0, abs=.3)


def test_page_says_how_far_the_run_is_and_what_to_type(tmp_path):
    out = write_log(tmp_path / "a<b>", [line(1, .9), report(50, [.5] * 8), line(1000, .1),
                                        report(1000, [.2, None] + [.1] * 6), line(2000, .05)])
    for name in ("0000050", "0001000", "best", "0002000 (copy)"):       # two are the user's own
        (out / f"grid-{name}.png").write_bytes(b"")
    lines, reports = page.read_log(out / "log.jsonl")
    text = page.page(out, CONFIG, "python train.py --data 'x & y'", "training", lines, reports,
                     {"<i>.png": "cut short"})
    assert "<strong>training</strong> · step 2,000 of 4,000 · 80 pictures a second · " \
        "7 minutes left" in text            # 2,000 steps of 16 pictures at 80 a second: 400 s
    assert "python train.py --data &#x27;x &amp; y&#x27;" in text and "http-equiv" in text
    assert "a&lt;b&gt;" in text and "&lt;i&gt;.png" in text and "<i>" not in text
    assert 'src="grid-0001000.png" alt="Samples at step 1,000"' in text
    assert "grid-0000050.png" in text and "loss from 0.9 at step 1 to 0.05 at step 2000" in text
    assert [len(curves) for curves in charts(text)] == [8, 1]
    assert charts(text)[0][1][0] == 2 * charts(text)[0][1][0][:1]      # a dot: one finite loss
    for state, words in (("failed", "this command resumes"), ("stopped", "this command resumes"),
                         ("finished", "--steps 8000")):
        text = page.page(out, CONFIG, "python train.py", state, lines, reports, {})
        assert "http-equiv" not in text and words in text


def test_reference_run_is_grey_behind_one_of_the_same_data_and_schedule(tmp_path, monkeypatch):
    reference = write_log(tmp_path / "reference", [report(50, [.8] * 8), report(1000, [.1] * 8),
                                                   report(4000, [.01] * 8)]) / "log.jsonl"
    monkeypatch.setattr(page, "REFERENCE", reference)
    flowers = CONFIG | dict(schedule="shifted", noise_d=32)
    reports = [report(50, [.8] * 8), report(1000, [.2] * 8)]

    def curves(reports, steps=2000, **settings):
        text = page.page(tmp_path, flowers | settings | dict(steps=steps), "", "training", [],
                         reports, {})
        return charts(text)[0] if charts(text) else []

    drawn = curves(reports)
    grey, coloured = drawn[:8], drawn[8:]
    assert {colour for _, colour in grey} == {None} and None not in {c for _, c in coloured}
    for (behind, _), (points, _) in zip(grey, coloured, strict=True):   # to step 1,000 of 2,000
        assert behind[0] == points[0] and behind[1][0] == points[1][0]
        assert behind[1][1] > points[1][1]                              # SVG: lower is further down
    assert len(curves([report(30, [.8] * 8)], steps=30)) == 8           # too short for it
    for other in (dict(data="photos"), dict(res=128), dict(schedule="cosine"), dict(noise_d=64)):
        assert len(curves(reports, **other)) == 8
    assert not curves([])
    monkeypatch.setattr(page, "REFERENCE", tmp_path / "nowhere")
    assert len(curves(reports)) == 8


def test_page_of_a_run_without_a_line_yet_is_whole(tmp_path):
    write_log(tmp_path, [])
    page.write_page(tmp_path, CONFIG, "training", {})
    assert "step 0 of 4,000" in (tmp_path / "index.html").read_text()


def test_page_of_500_000_steps_is_small(tmp_path):
    write_log(tmp_path, [line(step, 1 / step) for step in range(20, 500_001, 20)]
              + [report(step, [1 / step] * 8) for step in range(1000, 500_001, 1000)])
    for step in range(1000, 500_001, 1000):
        (tmp_path / f"grid-{step:07d}.png").write_bytes(b"")
    page.write_page(tmp_path, CONFIG | dict(data="x"), "training", {})
    text = (tmp_path / "index.html").read_text()
    assert len(text) < 100_000 and text.count("<img") < 20
    assert max(len(points) for curves in charts(text) for points, _ in curves) < 640


def test_a_run_writes_its_page_and_says_how_it_ended(tmp_path, little):
    out = tmp_path / "run"
    run_train(out, "--steps", 4, "--log-every", 1, "--sample-every", 2)
    text = (out / "index.html").read_text()
    assert "<strong>finished</strong> · step 4 of 4" in text and "grid-0000004.png" in text
    assert not list(out.glob("*.part"))


def test_tensorboard_gets_scalars_and_grids(tmp_path, little):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_train(tmp_path / "run", "--steps", 4, "--log-every", 1, "--sample-every", 2,
              "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    losses = {part["step"]: part["loss"] for part in page.read_log(tmp_path / "run/log.jsonl")[0]}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses)
    assert [event.step for event in events.Images("samples")] == [2, 4]


def test_a_full_disk_ends_what_is_written_for_tensorboard_alone(tmp_path, little, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert run_train(tmp_path / "run", "--steps", 2, "--tensorboard")["step"] == 2


def test_the_page_of_a_run_that_fails_says_so(tmp_path, little, monkeypatch):
    monkeypatch.setattr(run.Run, "save", lambda self: cli.fail("weights are no longer finite"))
    with pytest.raises(SystemExit):
        run_train(tmp_path / "run", "--steps", 2)
    assert "<strong>failed</strong>" in (tmp_path / "run" / "index.html").read_text()


def test_without_tensorboard_a_line_says_what_to_install(tmp_path, little, monkeypatch, capsys):
    import config
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert "pip install tensorboard" in one_line(capsys, train.main, ["--tensorboard"])


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
@pytest.mark.parametrize("width", [360, 900])
def test_a_browser_shows_it_from_the_disk_without_a_request_or_an_error(tmp_path, width):
    out = write_log(tmp_path / "run", [report(50, [.5 / 2**level for level in range(8)]),
                                       report(100, [.4 / 2**level for level in range(8)])])
    from PIL import Image
    Image.new("RGB", (400, 200), (250, 0, 250)).save(out / "grid-0000100.png")
    page.write_page(out, CONFIG, "finished", {})
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", "--enable-logging=stderr", f"--window-size={width},1400",
         f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}",
         f"--screenshot={tmp_path / 'shot.png'}", f"file://{out}/index.html"],
        capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    asked = re.findall(r'"url":"(http[^"]*)"', (tmp_path / "net.json").read_text())
    own = ".google.com/", ".googleapis.com/", ".gvt1.com/"              # of Chromium itself
    assert not [url for url in asked if not any(site in url for site in own)]
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert (abs(shot - (250, 0, 250)).sum(2) < 30).sum() > 10_000       # the grid
    for colour in page.COLOURS:             # each curve
        red_green_blue = [int(colour[k:k + 2], 16) for k in (1, 3, 5)]
        assert (abs(shot - red_green_blue).sum(2) < 60).sum() > 50
