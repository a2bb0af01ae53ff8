"""data.py: pictures of every kind, damaged ones, and the built-in flowers."""
import os
import struct
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from test_all import HERE, write_folder


def test_upright_pictures_are_turned_flagged_and_mirrored_left_to_right(tmp_path):
    upright = np.zeros((60, 36, 3), np.uint8)
    upright[:30, :18], upright[:30, 18:], upright[30:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)     # red left, green right, blue below
    Image.fromarray(upright).save(tmp_path / "upright.png")
    Image.fromarray(np.full((36, 60, 3), 9, np.uint8)).save(tmp_path / "lying.png")
    dataset, mirrored = data.Pictures(tmp_path, "24x40", portrait=True), set()
    for n in range(40):
        x, label, _ = dataset[n]
        assert x.shape == (3, 24, 40)
        if x.max() < 0:
            assert label.tolist() == [0, 0]
            continue
        assert label.tolist() == [0, 1]
        stood = np.rot90(((x + 1) / 2).permute(1, 2, 0).numpy(), -1)           # as sample.py turns them back
        assert stood.shape == (40, 24, 3) and stood[30:, :, 2].min() > .9 and stood[:10, :, 2].max() < .1
        left, right = stood[5, 3].argmax(), stood[5, 20].argmax()
        assert {left, right} == {0, 1}
        mirrored.add(left)
    assert mirrored == {0, 1}
    assert all(data.Pictures(tmp_path, "24x40")[n][1].tolist() == [0, 0] for n in range(4))         # without: cropped


def test_flowers_stand_and_lie_and_are_round():
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    dataset = data.Flowers("48x80", portrait=True)
    items = [dataset[n] for n in range(40)]
    x, upright = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])[:, 1]
    assert x.shape == (40, 3, 48, 80) and 8 < upright.sum() < 32
    found = score.score((x + 1) / 2)
    assert abs(found["axes"].median() - 1) < .01 and (abs(found["axes"] - 1) < .05).float().mean() > .9


def write_every_kind(folder):
    """One red-left, blue-right picture in every form a stranger's folder may hold -> {name: expected left colour}."""
    folder.mkdir(parents=True, exist_ok=True)
    rgb = Image.new("RGB", (48, 32), (255, 0, 0))
    rgb.paste((0, 0, 255), (24, 0, 48, 32))
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "UPPER.PNG")
    rgb.save(folder / "small.webp", lossless=True)
    rgb.save(folder / "photo.JPG", quality=100, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 8                        # taken with the camera turned: show it turned 90 degrees to the left
    rgb.rotate(-90, expand=True).save(folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    Image.new("L", (48, 32), 100).save(folder / "grey.png")
    Image.new("LA", (48, 32), (0, 128)).save(folder / "grey_alpha.png")
    Image.new("RGBA", (48, 32), (255, 0, 0, 0)).save(folder / "clear.png")
    rgba = Image.new("RGBA", (48, 32), (0, 0, 0, 51))
    rgba.save(folder / "half.png")
    palette = Image.new("P", (48, 32), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(folder / "palette.png", transparency=0)
    palette.paste(0, (0, 0, 48, 32))
    palette.save(folder / "palette_clear.png", transparency=0)
    Image.fromarray(np.full((32, 48), 200 * 257, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((32, 48), 200 * 257 + 128, np.uint16)).save(folder / "deep.tif")
    Image.fromarray(np.full((32, 48), 200 * 257, np.int32)).save(folder / "whole.tiff")
    for name, value in [("float1.tif", 200 / 255), ("float255.tif", 200), ("float65535.tif", 200 * 257)]:
        row = [value] * 40 + [1.02 * value / 200 * 255] * 2 + [-value, np.nan, np.nan, np.inf, np.inf, np.inf]
        Image.fromarray(np.array([row] * 32, np.float32)).save(folder / name)
    red, white = (255, 0, 0), (255, 255, 255)
    return {"rgb.png": red, "UPPER.PNG": red, "small.webp": red, "photo.JPG": red, "turned.jpg": red, "cmyk.jpg": red,
            "grey.png": (100,) * 3, "grey_alpha.png": (127,) * 3, "clear.png": white, "half.png": (204,) * 3,
            "palette.png": (0, 255, 0), "palette_clear.png": white,
            **dict.fromkeys(["deep.png", "deep.tif", "whole.tiff", "float1.tif", "float255.tif", "float65535.tif"], (200,) * 3)}


def test_loader_reads_every_kind_of_picture(tmp_path):
    expected = write_every_kind(tmp_path)
    dataset = data.Pictures(tmp_path, 32)
    assert sorted(dataset.names) == sorted(expected)
    for name, colour in expected.items():
        picture = np.asarray(dataset.open(name)[0])
        assert picture.shape == (32, 48, 3), name
        assert np.abs(picture[16, 6].astype(int) - colour).max() <= 3, (name, picture[16, 6])
        assert not name.startswith("float") or (picture[:, 47] > 240).all() and (picture[:, 43:45] < 40).all(), name    # inf, nan


def test_loader_is_a_function_of_seed_and_number(tmp_path):
    write_folder(tmp_path)
    first, second, other = data.Pictures(tmp_path, 16, seed=1), data.Pictures(tmp_path, 16, seed=1), data.Pictures(tmp_path, 16, seed=2)
    assert all(torch.equal(first[n][0], second[n][0]) for n in (20, 3, 11))
    assert not all(torch.equal(first[n][0], other[n][0]) for n in range(8))
    x, label, broken = first[0]
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1 and broken == {}


def test_an_epoch_has_every_picture_once(tmp_path):
    for i in range(8):
        Image.new("L", (16, 16), 10 * i).save(tmp_path / f"{i}.png")
    dataset = data.Pictures(tmp_path, 16)
    for epoch in range(4):
        greys = [round((dataset[epoch * 8 + n][0].mean().item() + 1) * 127.5) for n in range(8)]
        assert sorted(greys) == [10 * i for i in range(8)]


def test_first_level_folders_are_classes_in_a_folder_and_in_a_zip(tmp_path):
    write_folder(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in (tmp_path / "set").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "set"))
    with zipfile.ZipFile(tmp_path / "wrapped.zip", "w") as archive:         # as file managers make them: the folder itself inside
        archive.writestr("__MACOSX/set/a/._0.png", "not a picture")
        for file in (tmp_path / "set").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path))
    assert data.Pictures(tmp_path / "wrapped.zip", 32).classes == ["a", "b"]
    folder, archive = data.Pictures(tmp_path / "set", 32), data.Pictures(tmp_path / "set.zip", 32)
    assert folder.classes == archive.classes == ["a", "b"] and folder.labels == archive.labels == [0] * 4 + [1] * 4
    for n in range(16):
        assert torch.equal(folder[n][0], archive[n][0]) and torch.equal(folder[n][1], archive[n][1])


def test_flip_mirrors_half_and_no_flip_none(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8] = 255
    Image.fromarray(picture).save(tmp_path / "half.png")
    flipped = [data.Pictures(tmp_path, 16)[n][0][0, 0, 0].item() < 0 for n in range(200)]
    assert 70 < sum(flipped) < 130
    assert all(data.Pictures(tmp_path, 16, flip=False)[n][0][0, 0, 0] > 0 for n in range(20))


def test_crop_keeps_the_shorter_side_and_stays_inside(tmp_path):
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (40, 1, 3))       # 40 high, 120 wide
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    dataset = data.Pictures(tmp_path, 40, flip=False)
    lefts = {round((dataset[n][0][0, 0, 0].item() + 1) * 127.5) for n in range(100)}
    assert min(lefts) >= 0 and max(lefts) <= 160 and len(lefts) > 30


def test_jpeg_is_decoded_no_larger_than_needed_and_looks_the_same(tmp_path, monkeypatch):
    flower, _ = data.draw_flower(np.random.default_rng(3), 7, 800)
    Image.fromarray((flower * 255).astype(np.uint8)).save(tmp_path / "flower.jpg", quality=95)
    decoded, honest = [], data.to_rgb
    monkeypatch.setattr(data, "to_rgb", lambda image: decoded.append(image.size) or honest(image))
    for res in (64, 80):
        whole = Image.open(tmp_path / "flower.jpg").convert("RGB").resize((res, res), Image.Resampling.LANCZOS)
        ours = data.Pictures(tmp_path, res).open("flower.jpg")[0]
        assert np.square(np.asarray(ours, float) - np.asarray(whole, float)).mean() < 255**2 / 10**4    # 40 dB
    assert decoded == [(100, 100), (200, 200)]          # an eighth and a quarter: the least above 96 and 120


def test_corrupt_file_is_named_and_skipped(tmp_path):
    write_folder(tmp_path, 6, classes=())
    (tmp_path / "bad.png").write_bytes(b"this is not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:500])
    dataset = data.Pictures(tmp_path, 16)
    reasons = {name for n in range(8) for name in dataset[n][2]}
    assert reasons == {"bad.png", "cut.png"}
    assert all(dataset[n][0].shape == (3, 16, 16) for n in range(16))


def test_unfit_files_are_named_with_the_reason_and_nothing_hangs(tmp_path):
    """Pipes, links in a circle, bombs, PostScript, odd names: each is skipped in a moment and in little memory."""
    write_folder(tmp_path, 30, classes=())
    sound = (tmp_path / "0.png").read_bytes()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "sparse.webp", "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(20 << 30)
    (tmp_path / "bomb.png").write_bytes(png_of_one_colour(30_000, 30_000))
    (tmp_path / "large.png").write_bytes(png_of_one_colour(12_000, 12_000))
    (tmp_path / "thin.png").write_bytes(png_of_one_colour(1, 1_000_000))
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "empty.png").touch()
    (tmp_path / "b\na\u202e.png").write_bytes(b"no picture")
    (tmp_path / "größe 花.PNG").write_bytes(sound)
    with open(os.fsencode(tmp_path) + b"/latin-\xe9.png", "wb") as file:
        file.write(b"no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    dataset, start = data.Pictures(tmp_path, 128), time.time()
    assert len(dataset.names) == 42
    for i in range(len(dataset.names)):
        dataset.picture(i)
    assert time.time() - start < 20
    why = dict(loop="OSError", pipe="not a file", sparse="bytes are too many", bomb="DecompressionBombError",
               large="12000 x 12000 pixels are too many", thin="too long and thin", program="UnidentifiedImageError",
               empty="UnidentifiedImageError")
    assert set(map(data.printable, dataset.broken)) == {*(f"{name}.webp" if name == "sparse" else f"{name}.png" for name in why),
                                                        "b\\na\\u202e.png", "latin-\\udce9.png"}
    for name, words in why.items():
        assert words in dataset.broken.get(f"{name}.png", dataset.broken["sparse.webp"]), name
    assert all(why.isprintable() for why in dataset.broken.values())


def png_of_one_colour(width, height):
    """A black 1 bit PNG, a few kilobytes whatever its size."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) \
        + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_unreadable_files_and_folders_are_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 6)
    honest_stat, honest_scan = os.stat, os.scandir

    def refuse(honest, path, *more, **options):             # root reads everything: as if one were not
        if str(path).endswith(("0.png", "/b")):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path, *more, **options)
    monkeypatch.setattr(os, "scandir", lambda path: refuse(honest_scan, path))
    dataset = data.Pictures(tmp_path, 16)
    assert dataset.names == ["a/0.png", "a/2.png", "a/4.png"] and "PermissionError" in dataset.unread["b"]
    monkeypatch.setattr(data.os, "stat", lambda path, **options: refuse(honest_stat, path, **options))
    dataset.picture(0)
    monkeypatch.undo()
    assert dataset.broken.keys() == {"a/0.png"} and "PermissionError" in dataset.broken["a/0.png"]
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
    dataset = data.Pictures(tmp_path / "bad", 16)
    shapes = [dataset.picture(i)[0] is not None and min(dataset.picture(i)[0][0].shape[:2]) == 16 for i in range(400)]
    assert 50 < len(dataset.broken) < 350 and shapes.count(True) == 400 - len(dataset.broken)
    assert all("\n" not in why and len(why) <= 200 for why in dataset.broken.values())


def test_zip_with_names_that_lead_out_of_it_or_with_damage(tmp_path):
    """Nothing is unpacked: ../ and / lead nowhere. A damaged directory is refused, a damaged picture skipped."""
    write_folder(tmp_path / "set", 8)
    raw = (tmp_path / "set/a/0.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name in ("../a/0.png", "/b/1.png", "../../a/2.png", "a/./3.png", "folder.png/", "b/4.png"):
            archive.writestr(name, b"" if name[-1] == "/" else raw)
    dataset = data.Pictures(tmp_path / "odd.zip", 16)
    assert len(dataset.names) == 5 and dataset.classes == ["a", "b"]
    assert all(dataset[n][2] == {} for n in range(5)) and sorted(file.name for file in tmp_path.iterdir()) == ["odd.zip", "set"]
    whole = bytearray((tmp_path / "odd.zip").read_bytes())
    for name, at, refused in [("directory", whole.rindex(b"PK\1\2"), True), ("end", whole.rindex(b"PK\5\6"), True), ("picture", 200, False)]:
        bad = whole.copy()
        bad[at:at + 2] = b"??"
        (tmp_path / f"{name}.zip").write_bytes(bad)
        if refused:
            with pytest.raises(ValueError, match=r"^--data .*neither a folder nor a .zip that can be read"):
                data.Pictures(tmp_path / f"{name}.zip", 16)
        else:
            dataset = data.Pictures(tmp_path / f"{name}.zip", 16)
            assert [dataset.picture(i)[0] is None for i in range(5)].count(True) == 1 and len(dataset.broken) == 1


def angular_power(picture, x, y, radius):
    """Power of the brightness along a circle by its harmonic: a flower of k petals has k, 2 k, 3 k, ... and little else."""
    angle = np.arange(360) * 2 * np.pi / 360
    ring = picture[(y + radius * np.sin(angle)).round().astype(int), (x + radius * np.cos(angle)).round().astype(int)].sum(-1)
    power = np.abs(np.fft.rfft(ring - ring.mean())) ** 2
    return power / power.sum()


def test_flower_turned_by_2_pi_over_k_is_itself():
    for k in range(3, 13):
        picture, caption = data.draw_flower(np.random.default_rng(k), k, 256)
        assert (f" {k} " in caption or f" {data.NUMBERS[k - 3]} " in caption) and picture.shape == (256, 256, 3) and 0 <= picture.min() and picture.max() <= 1
        rings = [angular_power(picture, x, y, radius) for radius in (40, 55, 70)
                 for x in range(112, 146, 2) for y in range(112, 146, 2)]
        power = max(rings, key=lambda power: power[k::k].sum())
        assert power[k::k].sum() > .8, (k, power[k::k].sum())
        assert all(power[other::other].sum() < power[k::k].sum() - .2 for other in range(3, 13) if k % other), k


def test_flowers_are_the_same_at_every_resolution_and_differ_by_number():
    small, large = data.Flowers(32), data.Flowers(128)
    for n in range(5):
        (x, label, _), (y, same_label, _) = small[n], large[n]
        assert torch.equal(label, same_label) and (F.avg_pool2d(y, 4) - x).abs().mean() < .06
        assert torch.equal(x, data.Flowers(32)[n][0]) and not torch.equal(x, data.Flowers(32, seed=1)[n][0])
    labels = [small[n][1][0].item() for n in range(300)]
    assert set(labels) == set(range(10)) and small.classes[0] == "3 petals" and small.classes[9] == "12 petals"
