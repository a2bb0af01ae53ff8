"""figures.py: the figures of the README, read back from their pixels."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor

import figures
import uvit
from tests.helpers import one_line


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """(name of a figure, arguments of figures.py) -> its pixels, (H, W, 3) uint8."""
    monkeypatch.setattr(figures, "ASSETS", tmp_path)

    def drawn(name, *arguments):
        figures.main(list(map(str, arguments)))
        assert str(tmp_path / name) in capsys.readouterr().out
        return np.asarray(Image.open(tmp_path / name).convert("RGB"))
    return drawn


def distance(pixels, colour):
    return np.abs(pixels.astype(int) - ImageColor.getrgb(colour)).max(-1)


def axes(pixels):
    """The box around the curves, its lines two pixels of light grey: top, bottom, left, right."""
    frame = distance(pixels, "#d8d8d8") <= 20
    rows, columns = (np.flatnonzero(frame.mean(axis) > .5) for axis in (1, 0))
    return rows[0] + .5, rows[-1] - .5, columns[0] + .5, columns[-1] - .5


def value_of_curve(pixels, colour, x, y_range):
    """Value of a curve at x, a share of the box's width, by the rows that come closest to its
    colour.
    """
    top, bottom, left, right = axes(pixels)
    column = distance(pixels[int(top):int(bottom), round(left + x * (right - left))], colour)
    assert column.min() < 60, (colour, x)
    (low, high), rows = y_range, np.flatnonzero(column <= column.min() + 10) + int(top)
    return high - (rows.mean() - top) / (bottom - top) * (high - low)


# ---------------------------------------------------------------------------- the paper's figures

def test_figure_3_has_more_noise_in_the_shifted_row_at_every_time_but_the_ends(draw):
    pixels = draw("figure3.webp", "schedule") / 127.5 - 1
    tiles = [[pixels[100 * row:100 * row + 96, 100 * column:100 * column + 96]
              for column in range(9)] for row in (0, 1)]
    clean = tiles[0][0]
    assert np.abs(tiles[1][0] - clean).mean() < .05             # t = 0: the picture
    likeness = [[np.corrcoef(tile.ravel(), clean.ravel())[0, 1] for tile in row] for row in tiles]
    cosine, shifted = likeness
    assert all(a > b for a, b in zip(cosine[1:8], shifted[1:8])), likeness
    assert max(cosine[8], shifted[8]) < .2                      # t = 1: noise
    assert all(row[i] > row[i + 1] - .02 for row in likeness for i in range(8))


def test_figure_5_has_the_curves_of_eq_5_and_6(draw):
    pixels = draw("figure5.webp", "schedule")
    for t in (.35, .5, .65):
        cosine = -2 * math.log(math.tan(math.pi / 2 * t))
        low, high = (cosine + 2 * math.log(noise_d / 512) for noise_d in (32, 256))
        curves = {"#333333": cosine, "#1f5fa8": high, "#b3401f": low,
                  "#2c8a4b": t * low + (1 - t) * high}
        for colour, logsnr in curves.items():
            assert abs(value_of_curve(pixels, colour, t, (-25, 25)) - logsnr) < .5, (t, colour)


def test_figure_7_shows_the_picture_its_low_band_and_grey_details(draw):
    pixels = draw("figure7.webp", "wavelet")
    picture = pixels[6:262, :256]
    averaged = F.avg_pool2d(torch.from_numpy(picture.copy()).permute(2, 0, 1).float(), 4)
    low = pixels[:64, 560:624]                                  # of the channels of the network
    assert np.abs(low - averaged.permute(1, 2, 0).numpy()).mean() < 5
    assert np.array_equal(pixels[6:70, 280:344], low)           # the usual nested picture
    details = [pixels[row:row + 64, 560 + column:624 + column]
               for row in range(0, 268, 68) for column in range(0, 268, 68)][1:]
    assert len(details) == 15 and all(abs(band.mean() - 127) < 4 for band in details)
    assert low.std() > 3 * max(band.std() for band in details[3:])      # the finest: most is grey


# ---------------------------------------------------------------------------- a run's curves

def write_log(folder, steps, losses, *more):
    """log.jsonl of a run: losses of 8 noise levels at these steps, among other lines."""
    lines = [json.dumps(dict(step=1, loss=1.0, norm=2.0))]
    lines += [json.dumps(dict(step=step, loss_by_noise_level=row))
              for step, row in zip(steps, losses)]
    (folder / "log.jsonl").write_text("".join(line + "\n" for line in lines) + "".join(more))


def test_curve_of_a_falling_loss_ends_lower_than_it_begins_at_the_decades_of_its_losses(
        tmp_path, draw):
    """Level k falls from 10^-(0.1 + k / 10) to a tenth of it; the last one rises instead."""
    start = [10 ** -(.1 + k / 10) for k in range(8)]
    end = [loss / 10 for loss in start[:7]] + [.9]
    middle = [math.sqrt(a * b) for a, b in zip(start, end)]
    write_log(tmp_path, (2000, 3000, 4000), (start, middle, end))
    pixels = draw("curves.png", "curves", tmp_path)
    for level, colour in enumerate(figures.COLOURS):
        values = [value_of_curve(pixels, colour, x, (-2, 0)) for x in (.52, .75, .98)]
        slope = math.log10(end[level] / start[level])
        expected = [math.log10(start[level]) + slope * (x - .5) / .5 for x in (.52, .75, .98)]
        assert np.allclose(values, expected, atol=.06), (level, values, expected)
        assert (values[2] < values[0] - .5) == (level < 7)


def test_curves_leave_out_losses_that_were_not_finite_and_a_line_that_was_cut_short(tmp_path, draw):
    losses = [[.5] * 8, [None] + [.05] * 7, [.05] * 8, [.05] * 8]
    write_log(tmp_path, (1000, 2000, 3000, 4000), losses, '{"step": 5000, "loss_by')
    pixels = draw("curves.png", "curves", tmp_path)
    value = value_of_curve(pixels, figures.COLOURS[7], .9, (-2, 0))       # drawn last, above others
    assert abs(value - math.log10(.05)) < .06


# ---------------------------------------------------------------------------- the command

def test_without_arguments_all_figures_are_drawn_that_need_no_run(tmp_path, draw):
    draw("figure3.webp")
    assert sorted(file.name for file in tmp_path.iterdir()) == \
        [f"figure{number}.webp" for number in (3, 5, 7)]


@pytest.mark.parametrize("arguments, words", [
    ("figure3", "usage: "), ("schedule more", "usage: "), ("curves", "usage: "),
    ("sizes", "usage: "), ("curves {tmp}/none", "none/log.jsonl: No such file"),
    ("curves {tmp}", "holds 1 reports"), ("sizes 7", "--res 7: sides must be")])
def test_wrong_arguments_of_figures_are_one_line(arguments, words, tmp_path, capsys):
    write_log(tmp_path, (50,), ([.1] * 8,))
    assert words in one_line(capsys, figures.main, arguments.format(tmp=tmp_path).split())


def test_sizes_are_those_of_the_models_that_have_them(capsys):
    figures.main(["sizes", "72"])               # 8 x 8 tokens of `laptop` need multiples of 16
    rows = [line.split("`")[1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [name for name in uvit.PRESETS if name != "laptop"]


def test_a_curve_of_one_point_is_seen():
    sheet = figures.plot({"one": ([1.], [.5], "#ff0000")}, (300, 200), (0, 2), (0, 1), "title")
    box = sheet.crop((60, 60, 230, 140))            # without the legend
    assert any(red > 200 and green < 80 for _, (red, green, _) in box.getcolors(10**5))
