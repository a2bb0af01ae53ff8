"""data.py: pictures of every kind, damaged ones; flowers.py: the built-in flowers."""
import os
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
import score
import torch
import torch.nn.functional as F
from PIL import Image

import data
import flowers
import listing
from tests.helpers import write_folder


# ---------------------------------------------------------------------------- every kind of picture

def write_every_kind(folder):
    """One picture, red at the left, in every form that a folder may hold -> {name: left colour}."""
    folder.mkdir(parents=True, exist_ok=True)
    size, red, white = (48, 32), (255, 0, 0), (255, 255, 255)
    rgb = Image.new("RGB", size, red)
    rgb.paste((0, 0, 255), (24, 0, 48, 32))
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "UPPER.PNG")
    rgb.save(folder / "small.webp", lossless=True)
    rgb.save(folder / "photo.JPG", quality=100, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 8                        # the camera was turned: turn it 90 degrees to the left
    turned = rgb.rotate(-90, expand=True)
    turned.save(folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    rgb.save(folder / "bad_exif.png", exif=b"Exif\0\0no EXIF at all")
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    Image.new("L", size, 100).save(folder / "grey.png")
    Image.new("LA", size, (0, 128)).save(folder / "grey_alpha.png")
    Image.new("RGBA", size, (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("RGBA", size, (0, 0, 0, 51)).save(folder / "half.png")
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(folder / "palette.png", transparency=0)
    palette.paste(0, (0, 0, 48, 32))
    palette.save(folder / "palette_clear.png", transparency=0)
    deep = np.full((32, 48), 200 * 257)
    Image.fromarray(deep.astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray((deep + 128).astype(np.uint16)).save(folder / "deep.tif")
    Image.fromarray(deep.astype(np.int32)).save(folder / "whole.tiff")
    floats = {"float1.tif": 200 / 255, "float255.tif": 200, "float65535.tif": 200 * 257}
    for name, value in floats.items():
        ends = [1.02 * value / 200 * 255] * 2 + [-value, np.nan, np.nan] + [np.inf] * 3
        row = [value] * 40 + ends
        Image.fromarray(np.array([row] * 32, np.float32)).save(folder / name)
    light = ["deep.png", "deep.tif", "whole.tiff", *floats]
    return {
        "rgb.png": red, "UPPER.PNG": red, "small.webp": red, "photo.JPG": red, "turned.jpg": red,
        "bad_exif.png": red, "cmyk.jpg": red, "grey.png": (100,) * 3,
        "grey_alpha.png": (127,) * 3, "clear.png": white,
        "half.png": (204,) * 3, "palette.png": (0, 255, 0), "palette_clear.png": white,
        **dict.fromkeys(light, (200,) * 3)}


def test_loader_reads_every_kind_of_picture(tmp_path):
    expected = write_every_kind(tmp_path)
    dataset = data.Pictures(tmp_path, 32)
    assert sorted(dataset.names) == sorted(expected)
    for name, colour in expected.items():
        picture = np.asarray(dataset.open(dataset.names.index(name))[0])
        assert picture.shape == (32, 48, 3), name
        assert np.abs(picture[16, 6].astype(int) - colour).max() <= 3, (name, picture[16, 6])
        if name.startswith("float"):
            assert (picture[:, 47] > 240).all() and (picture[:, 43:45] < 40).all(), name  # inf, nan


def test_loader_is_a_function_of_seed_and_number(tmp_path):
    write_folder(tmp_path)
    first, second, other = (data.Pictures(tmp_path, 16, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[n][0], second[n][0]) for n in (20, 3, 11))
    assert not all(torch.equal(first[n][0], other[n][0]) for n in range(8))
    x, cond, broken = first[0]
    assert x.shape == (3, 16, 16) and x.dtype == torch.uint8 and broken == {}


def test_an_epoch_has_every_picture_once(tmp_path):
    for i in range(8):
        Image.new("L", (16, 16), 10 * i).save(tmp_path / f"{i}.png")
    dataset = data.Pictures(tmp_path, 16)
    for epoch in range(4):
        pixels = [dataset[epoch * 8 + n][0].unique().tolist() for n in range(8)]
        assert sorted(pixels) == [[10 * i] for i in range(8)]


def test_first_level_folders_are_classes_in_a_folder_and_in_a_zip(tmp_path):
    write_folder(tmp_path / "set")
    pictures = list((tmp_path / "set").rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in pictures:
            archive.write(file, file.relative_to(tmp_path / "set"))
    with zipfile.ZipFile(tmp_path / "wrapped.zip", "w") as archive:     # as file managers make them
        archive.writestr("__MACOSX/set/a/._0.png", "not a picture")
        for file in pictures:
            archive.write(file, file.relative_to(tmp_path))
    assert data.Pictures(tmp_path / "wrapped.zip", 32).classes == ["a", "b"]
    folder, archive = (data.Pictures(tmp_path / name, 32) for name in ("set", "set.zip"))
    assert folder.classes == archive.classes == ["a", "b"]
    assert folder.listing.labels.tolist() == archive.listing.labels.tolist() == [0] * 4 + [1] * 4
    for n in range(16):
        assert torch.equal(folder[n][0], archive[n][0])
        assert folder[n][1] == archive[n][1] and folder[n][1].label in (0, 1)


# ---------------------------------------------------------------------------- crop, flip, turn

def test_flip_mirrors_half_and_no_flip_none(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8] = 255
    Image.fromarray(picture).save(tmp_path / "half.png")
    flipped = [data.Pictures(tmp_path, 16)[n][0][0, 0, 0].item() == 0 for n in range(200)]
    assert 70 < sum(flipped) < 130
    unflipped = data.Pictures(tmp_path, 16, flip=False)
    assert all(unflipped[n][0][0, 0, 0] == 255 for n in range(20))


def test_crop_keeps_the_shorter_side_and_stays_inside(tmp_path):
    ramp = np.arange(0, 240, 2, dtype=np.uint8)[None, :, None]
    Image.fromarray(np.tile(ramp, (40, 1, 3))).save(tmp_path / "ramp.png")  # 40 high, 120 wide
    dataset = data.Pictures(tmp_path, 40, flip=False)
    lefts = {dataset[n][0][0, 0, 0].item() for n in range(100)}
    assert min(lefts) >= 0 and max(lefts) <= 160 and len(lefts) > 30


def test_upright_pictures_are_turned_flagged_and_mirrored_left_to_right(tmp_path):
    upright = np.zeros((60, 36, 3), np.uint8)               # red left, green right, blue below
    upright[:30, :18], upright[:30, 18:], upright[30:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    Image.fromarray(np.full((36, 60, 3), 9, np.uint8)).save(tmp_path / "lying.png")
    dataset, mirrored = data.Pictures(tmp_path, "24x40", portrait=True), set()
    for n in range(40):
        x, cond, _ = dataset[n]
        assert x.shape == (3, 24, 40) and cond.label == -1
        assert cond.portrait == (x.max() > 127)
        if not cond.portrait:
            continue
        stood = np.rot90((x / 255).permute(1, 2, 0).numpy(), -1)    # as sample.py turns it back
        assert stood.shape == (40, 24, 3)
        assert stood[30:, :, 2].min() > .9 and stood[:10, :, 2].max() < .1
        left, right = stood[5, 3].argmax(), stood[5, 20].argmax()
        assert {left, right} == {0, 1}
        mirrored.add(left)
    assert mirrored == {0, 1}
    cropped = data.Pictures(tmp_path, "24x40")
    assert all(cropped[n][1].portrait == 0 for n in range(4))


def test_jpeg_is_decoded_no_larger_than_needed_and_looks_the_same(tmp_path, monkeypatch):
    flower, _ = flowers.draw_flower(np.random.default_rng(3), 7, 800)
    Image.fromarray((flower * 255).astype(np.uint8)).save(tmp_path / "flower.jpg", quality=95)
    decoded, to_rgb = [], data.to_rgb
    monkeypatch.setattr(data, "to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
    for res in (64, 80):
        whole = Image.open(tmp_path / "flower.jpg").convert("RGB")
        whole = whole.resize((res, res), Image.Resampling.LANCZOS)
        ours = data.Pictures(tmp_path, res).open(0)[0]
        error = np.square(np.asarray(ours, float) - np.asarray(whole, float)).mean()
        assert error < 255**2 / 10**4                                   # 40 dB
    # An eighth and a quarter: the least above 96 and 120.
    assert decoded == [(100, 100), (200, 200)]


# ---------------------------------------------------------------------------- damage

def test_corrupt_file_is_named_and_skipped(tmp_path):
    write_folder(tmp_path, 6, classes=())
    (tmp_path / "bad.png").write_bytes(b"this is not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:500])
    dataset = data.Pictures(tmp_path, 16)
    assert {name for n in range(8) for name in dataset[n][2]} == {"bad.png", "cut.png"}
    assert all(dataset[n][0].shape == (3, 16, 16) for n in range(16))


def png_of_one_colour(width, height):
    """A black 1 bit PNG, a few kilobytes whatever its size."""
    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))

    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


UNFIT = {           # file: a part of the reason
    "loop.png": "OSError", "pipe.png": "not a file", "sparse.webp": "bytes are too many",
    "bomb.png": "DecompressionBombError", "large.png": "12000 x 12000 pixels are too many",
    "thin.png": "too long and thin", "program.png": "UnidentifiedImageError",
    "empty.png": "UnidentifiedImageError"}


def write_unfit(folder, sound):
    """The files of UNFIT and some with odd names; sound: the bytes of a picture."""
    (folder / "folder.png").mkdir()
    (folder / "circle").symlink_to(folder)
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with open(folder / "sparse.webp", "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(20 << 30)
    (folder / "bomb.png").write_bytes(png_of_one_colour(30_000, 30_000))
    (folder / "large.png").write_bytes(png_of_one_colour(12_000, 12_000))
    (folder / "thin.png").write_bytes(png_of_one_colour(1, 1_000_000))
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "empty.png").touch()
    (folder / "b\na\u202e.png").write_bytes(b"no picture")
    (folder / "größe 花.PNG").write_bytes(sound)
    with open(os.fsencode(folder) + b"/latin-\xe9.png", "wb") as file:
        file.write(b"no picture")
    animation = Image.new("RGB", (9, 9))
    animation.save(folder / "two.gif", save_all=True,
                   append_images=[Image.new("RGB", (9, 9), "red")])


def test_unfit_files_are_named_with_the_reason_and_nothing_hangs(tmp_path):
    """Pipes, links in a circle, bombs, PostScript, odd names: skipped quickly, in little memory."""
    write_folder(tmp_path, 30, classes=())
    write_unfit(tmp_path, (tmp_path / "0.png").read_bytes())
    dataset, start = data.Pictures(tmp_path, 128), time.time()
    assert len(dataset.names) == 42
    for i in range(len(dataset.names)):
        dataset.picture(i)
    assert time.time() - start < 20
    odd = {"b\\na\\u202e.png", "latin-\\udce9.png"}
    assert set(map(listing.printable, dataset.broken)) == {*UNFIT, *odd}
    for name, why in UNFIT.items():
        assert why in dataset.broken[name], name
    assert all(why.isprintable() for why in dataset.broken.values())
    assert listing.reason(ValueError("two\nlines")) == r"ValueError: two\nlines"


def test_unreadable_files_and_folders_are_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 6)
    originals = dict(stat=os.stat, scandir=os.scandir)

    def refuse(name):                           # root reads everything: as if one were not root
        def call(path, *more, **options):
            if str(path).endswith(("0.png", "/b")):
                raise PermissionError(13, "Permission denied", str(path))
            return originals[name](path, *more, **options)
        monkeypatch.setattr(os, name, call)

    refuse("scandir")
    dataset = data.Pictures(tmp_path, 16)
    assert list(dataset.names) == ["a/0.png", "a/2.png", "a/4.png"]
    assert "PermissionError" in dataset.unread["b"]
    refuse("stat")
    dataset.picture(0)
    monkeypatch.undo()
    assert dataset.broken.keys() == {"a/0.png"}
    assert "PermissionError" in dataset.broken["a/0.png"]
    assert dataset.picture(0)[0] is not None and not dataset.broken         # it came back


def test_damaged_pictures_by_the_hundred_are_read_or_named(tmp_path):
    sound, rng = write_every_kind(tmp_path / "sound"), np.random.default_rng(0)
    (tmp_path / "bad").mkdir()
    for i in range(400):
        name = list(sound)[i % len(sound)]
        raw = bytearray((tmp_path / "sound" / name).read_bytes())
        if i % 4 == 0:
            raw = raw[:rng.integers(len(raw))]
        for _ in range(rng.integers(1, 20) if i % 4 else 0):
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        (tmp_path / "bad" / f"{i}{name}").write_bytes(raw)
    dataset, read = data.Pictures(tmp_path / "bad", 16), 0
    for i in range(400):
        content, _ = dataset.picture(i)
        if content is not None:
            assert min(content[0].shape[:2]) == 16
            read += 1
    assert 50 < len(dataset.broken) < 350 and read == 400 - len(dataset.broken)
    assert all("\n" not in why and len(why) <= 200 for why in dataset.broken.values())


def test_names_in_a_zip_that_lead_out_of_it_lead_nowhere(tmp_path):
    """Nothing is unpacked: ../ and / are parts of a name."""
    write_odd_zip(tmp_path)
    dataset = data.Pictures(tmp_path / "odd.zip", 16)
    assert len(dataset.names) == 5 and dataset.classes == ["a", "b"]
    assert all(dataset[n][2] == {} for n in range(5))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["odd.zip", "set"]


@pytest.mark.parametrize("part, refused", [("directory", True), ("end", True), ("picture", False)])
def test_zip_with_a_damaged_directory_is_refused_a_damaged_picture_skipped(tmp_path, part, refused):
    write_odd_zip(tmp_path)
    raw = bytearray((tmp_path / "odd.zip").read_bytes())
    at = dict(directory=raw.rindex(b"PK\1\2"), end=raw.rindex(b"PK\5\6"), picture=200)[part]
    raw[at:at + 2] = b"??"
    (tmp_path / "bad.zip").write_bytes(raw)
    if refused:
        why = r"^--data .*neither a folder nor a .zip that can be read"
        with pytest.raises(ValueError, match=why):
            data.Pictures(tmp_path / "bad.zip", 16)
        return
    dataset = data.Pictures(tmp_path / "bad.zip", 16)
    assert [dataset.picture(i)[0] is None for i in range(5)].count(True) == 1
    assert len(dataset.broken) == 1


def write_odd_zip(folder):
    write_folder(folder / "set", 8)
    raw = (folder / "set/a/0.png").read_bytes()
    with zipfile.ZipFile(folder / "odd.zip", "w") as archive:
        for name in ("../a/0.png", "/b/1.png", "../../a/2.png", "a/./3.png", "folder.png/",
                     "b/4.png"):
            archive.writestr(name, b"" if name[-1] == "/" else raw)


# ---------------------------------------------------------------------------- flowers.py

def angular_power(picture, x, y, radius):
    """Power of the brightness along a circle by its harmonic: a flower of k petals has
    k, 2 k, 3 k, ... and little else.
    """
    angle = np.arange(360) * 2 * np.pi / 360
    rows = (y + radius * np.sin(angle)).round().astype(int)
    columns = (x + radius * np.cos(angle)).round().astype(int)
    ring = picture[rows, columns].sum(-1)
    power = np.abs(np.fft.rfft(ring - ring.mean())) ** 2
    return power / power.sum()


@pytest.mark.parametrize("k", range(3, 13))
def test_flower_turned_by_2_pi_over_k_is_itself(k):
    picture, caption = flowers.draw_flower(np.random.default_rng(k), k, 256)
    assert f" {k} " in caption or f" {flowers.NUMBERS[k - 3]} " in caption
    assert picture.shape == (256, 256, 3) and 0 <= picture.min() and picture.max() <= 1
    rings = [angular_power(picture, x, y, radius) for radius in (40, 55, 70)
             for x in range(112, 146, 2) for y in range(112, 146, 2)]
    power = max(rings, key=lambda power: power[k::k].sum())
    mine = power[k::k].sum()
    assert mine > .8, mine
    assert all(power[other::other].sum() < mine - .2 for other in range(3, 13) if k % other)


def test_flowers_are_the_same_at_every_resolution_and_differ_by_number():
    small, large = flowers.Flowers(32), flowers.Flowers(128)
    again, other = flowers.Flowers(32), flowers.Flowers(32, seed=1)
    for n in range(5):
        (x, cond, _), (y, cond_of_y, _) = small[n], large[n]
        assert cond == cond_of_y and (F.avg_pool2d(y / 1, 4) - x).abs().mean() < 7.5
        assert torch.equal(x, again[n][0]) and not torch.equal(x, other[n][0])
    assert {small[n][1].label for n in range(300)} == set(range(10))
    assert small.classes[0] == "3 petals" and small.classes[9] == "12 petals"


def test_a_pixel_of_a_flower_is_the_nearest_of_256_levels():
    rng = np.random.default_rng((0, 3))
    picture, _ = flowers.draw_flower(rng, 3 + int(rng.integers(10)), 32)
    x, _, _ = flowers.Flowers(32)[3]
    assert x.dtype == torch.uint8
    assert np.abs(x.permute(1, 2, 0).numpy() / 255 - picture).max() <= .5 / 255 + 1e-6


def test_half_of_the_wide_flowers_are_turned_and_all_are_round():
    dataset = flowers.Flowers("48x80", portrait=True)
    x, cond, _ = data.collate([dataset[n] for n in range(40)])
    assert x.shape == (40, 3, 48, 80) and 8 < cond.portrait.sum() < 32
    axes = score.score(x / 255)["axes"]                 # height over width
    assert abs(axes.median() - 1) < .01 and (abs(axes - 1) < .05).float().mean() > .9
