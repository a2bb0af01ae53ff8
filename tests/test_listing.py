"""Listings: the same names in little memory, made once for a run, the same on all machines."""
import os
import pickle
import re
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import listing
import train
from ranks import Ranks
from tests.helpers import TRAIN, full_disk, one_line, run_ranks, run_train, SMALL, write_folder

ODD = ["b.png", "a/0.png", "a-b/0.png", "a/b/c.webp", "a b/1.JPG", "a.png", "größe/花.png",
       "Z/0.gif", "a/.hidden.png", ".git/x.png", "a/b.txt.png", "a/b-.png", "b/note.txt",
       "b/none.jpeg"]
SHOWN = sorted(name for name in ODD if not re.search(r"(^|/)\.|\.txt$", name))


def write_odd_names(folder):
    for name in ODD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with open(os.fsencode(folder) + b"/latin-\xe9.png", "wb"):
        pass
    for stem in ("a/0", "a", "b/none"):
        (folder / f"{stem}.txt").write_text(f"caption of {stem}")


def zip_of(folder, file, names):
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.write(folder / name, name)


def test_names_are_in_the_order_of_whole_names_with_their_classes_and_captions(tmp_path):
    write_odd_names(tmp_path / "set")
    everything = [*ODD, "a/0.txt", "a.txt", "b/none.txt"]
    zip_of(tmp_path / "set", tmp_path / "set.zip", everything)
    for path, shown in ((tmp_path / "set", sorted([*SHOWN, "latin-\udce9.png"])),
                        (tmp_path / "set.zip", SHOWN)):
        found = listing.list_pictures(path)
        assert list(found.names) == shown and len(found.names) == len(shown)
        assert found.classes == sorted({name.split("/")[0] for name in shown if "/" in name})
        labels = [found.classes.index(name.split("/")[0]) if "/" in name else -1 for name in shown]
        assert found.labels.tolist() == labels
        texts = {name: found.texts[text] for name, text in zip(shown, found.text_of) if text >= 0}
        assert texts == {"a/0.png": "a/0.txt", "a.png": "a.txt", "b/none.jpeg": "b/none.txt"}
        base = "\n".join(name.rpartition("/")[2] for name in shown)
        assert found.code == zlib.crc32(base.encode("utf-8", "surrogatepass"))
        with pytest.raises(IndexError):
            found.names[len(shown)]


def test_what_is_kept_of_a_listing_keeps_labels_captions_and_places(tmp_path):
    write_folder(tmp_path / "set", 6)
    for i in range(6):
        (tmp_path / f"set/{'ab'[i % 2]}/{i}.txt").write_text(f"picture {i}")
    names = [path.relative_to(tmp_path / "set") for path in (tmp_path / "set").rglob("*.*")]
    zip_of(tmp_path / "set", tmp_path / "set.zip", names)
    for path in (tmp_path / "set", tmp_path / "set.zip"):
        whole = listing.list_pictures(path)
        kept = [i for i, name in enumerate(whole.names) if name[-5] in "25"]
        some = data.Pictures(path, 16, tokens=lambda caption: [len(caption)],
                             listing=whole.only(kept))
        assert list(some.names) == ["a/2.png", "b/5.png"]
        assert some.listing.labels.tolist() == [0, 1]
        assert [some.captions(i) for i in (0, 1)] == [["picture 2"], ["picture 5"]]
        original = Image.open(tmp_path / "set/b/5.png").resize((20, 16), Image.Resampling.LANCZOS)
        assert np.array_equal(some.open(1)[0], original)


def test_links_out_of_the_folder_are_followed_only_if_asked_for(tmp_path):
    write_folder(tmp_path / "set2", 4, classes=("c",))
    write_folder(tmp_path / "set", 4)
    (tmp_path / "set/a/out").symlink_to(tmp_path / "set2")
    (tmp_path / "set/a/one.png").symlink_to(tmp_path / "set2/c/0.png")
    (tmp_path / "set/within").symlink_to(tmp_path / "set/b")
    (tmp_path / "set/b/2.png").symlink_to(tmp_path / "set/a/0.png")
    found = listing.list_pictures(tmp_path / "set")
    assert list(found.names) == ["a/0.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"]
    assert found.unread == {"a": "2 links out of the folder are not followed without --set "
                                 "follow_links=on"}
    found = listing.list_pictures(tmp_path / "set", follow_links=True)
    assert len(found.names) == 5 + 1 + 4 and not found.unread
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/link").symlink_to(tmp_path / "set2")
    with pytest.raises(ValueError, match="no picture there .1 links out .* follow_links=on"):
        listing.list_pictures(tmp_path / "empty")
    assert listing.list_pictures(tmp_path / "empty/link").classes == ["c"]     # itself a link


def test_a_listing_is_made_once_and_mapped_and_made_again_if_the_pictures_change(
        tmp_path, monkeypatch):
    write_folder(tmp_path / "set", 4)
    names = ["a/0.png", "b/1.png", "a/2.png", "b/3.png"]
    zip_of(tmp_path / "set", tmp_path / "set.zip", names)
    lists, honest = [], listing.list_pictures
    monkeypatch.setattr(listing, "list_pictures", lambda *args: lists.append(1) or honest(*args))
    file, ranks = tmp_path / "run" / "listing-0.pt", Ranks()

    def again(path="set.zip"):
        lists.clear()
        found = listing.list_together(str(tmp_path / path), False, tmp_path / "run", ranks)
        assert found.file == file
        dataset = data.Pictures(tmp_path / path, 16, listing=found)
        assert len(dataset.names) and b".png" not in pickle.dumps(dataset)  # loaders map it, too
        assert list(pickle.loads(pickle.dumps(found)).names) == list(found.names)
        return list(found.names), len(lists)

    assert again() == (sorted(names), 1) and again() == (sorted(names), 0)
    zip_of(tmp_path / "set", tmp_path / "set.zip", names[:3])
    assert again() == (sorted(names[:3]), 1) and again() == (sorted(names[:3]), 0)
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"a/0.png")] ^= 1
    file.write_bytes(raw)
    assert again() == (sorted(names[:3]), 1)
    assert again("set") == (sorted(names), 1) and again("set") == (sorted(names), 1)
    before = file.stat().st_mtime_ns
    assert again("set")[1] == 1 and file.stat().st_mtime_ns == before       # the same: as it lies
    (tmp_path / "set/a/0.png").unlink()
    assert again("set") == (sorted(names[1:]), 1)


def test_without_room_for_it_a_listing_stays_in_memory_and_foreign_folders_stay_as_they_are(
        tmp_path):
    write_folder(tmp_path / "set", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").touch()
    (tmp_path / "file").touch()
    for out in ("mine", "file"):
        found = listing.list_together(str(tmp_path / "set"), False, tmp_path / out, Ranks())
        assert len(found.names) == 4 and found.file is None
        assert list(pickle.loads(pickle.dumps(found)).names) == list(found.names)
    assert os.listdir(tmp_path / "mine") == ["letter"]
    with full_disk(100):
        found = listing.list_together(str(tmp_path / "set"), False, tmp_path / "run", Ranks())
    assert len(found.names) == 4 and found.file is None and not os.listdir(tmp_path / "run")


MACHINE = """
import os, runpy, sys
from pathlib import Path
os.environ["LOCAL_RANK"] = "0"              # each rank on a machine of its own
os.chdir(Path(__file__).parent / os.environ["RANK"])
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("change", ["none", "one more", "one less", "captions"])
def test_machines_whose_pictures_differ_by_one_file_are_refused_on_both_with_its_name(
        tmp_path, change):
    for machine in "01":
        write_folder(tmp_path / machine / "set", 10)
    second = tmp_path / "1/set"
    if change == "one more":
        (second / "a/new.png").write_bytes((second / "a/0.png").read_bytes())
    elif change == "one less":
        (second / "b/3.png").unlink()
    elif change == "captions":
        (second / "b/3.txt").touch()
    script = tmp_path / "machine.py"
    script.write_text(MACHINE.format(script=str(TRAIN)))
    said = run_ranks(2, script, *SMALL, "--data", "set", "--res", "16", "--steps", "1", "--out",
                     "run", code=0 if change == "none" else 2)
    lines = [line for line in said.splitlines() if line.startswith("--data set")]
    expected = {"none": r"$^",
                "one more": "a/new.png is there for rank 1 on .*, but not for rank 0",
                "one less": "b/3.png is there for rank 0 on .*, but not for rank 1",
                "captions": "pictures of rank 0 on .* and of rank 1 on .* have other captions"}
    assert len(lines) == (0 if change == "none" else 2), said
    assert all(re.search(expected[change], line) for line in lines), said
    for machine in "01":
        file = tmp_path / machine / f"run/listing-{machine}.pt"
        assert file.exists() == (change == "none")


def test_only_the_listing_that_is_meant_is_loaded(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", 4)
    made = listing.list_pictures(tmp_path / "set")
    listing.save(made, tmp_path / "listing.pt")
    assert list(listing.load(tmp_path / "listing.pt", made.digest).names) == list(made.names)
    with pytest.raises(AssertionError):
        listing.load(tmp_path / "listing.pt", "another")
    monkeypatch.setattr(listing, "VERSION", 99)
    with pytest.raises(AssertionError):
        listing.load(tmp_path / "listing.pt", made.digest)


def test_a_picture_with_another_name_in_its_header_is_read(tmp_path):
    """As on Windows, or with a Unicode name beside the old one: zipfile compares the header's."""
    write_folder(tmp_path / "set", 4)
    zip_of(tmp_path / "set", tmp_path / "set.zip", ["a/0.png", "b/1.png"])
    raw = (tmp_path / "set.zip").read_bytes()       # a NUL ends what zipfile calls the file name
    (tmp_path / "odd.zip").write_bytes(raw.replace(b"b/1.png", b"b/1.png").replace(
        b"a/0.png", b"a.png\0x"))
    whole = listing.list_pictures(tmp_path / "odd.zip")
    for found in (whole, whole.only([0, 1])):
        dataset = data.Pictures(tmp_path / "odd.zip", 16, listing=found)
        assert list(dataset.names) == ["a.png", "b/1.png"]
        for i in (0, 1):
            assert dataset.picture(i)[0] is not None, dataset.broken


def test_machines_that_share_a_folder_write_a_listing_each(tmp_path):
    """Their zips hold the same files in another order."""
    write_folder(tmp_path / "set", 10)
    names = sorted(str(path.relative_to(tmp_path / "set"))
                   for path in (tmp_path / "set").rglob("*.png"))
    for machine in "01":
        (tmp_path / machine).mkdir()
        zip_of(tmp_path / "set", tmp_path / machine / "set.zip", names[::1 - 2 * int(machine)])
    script = tmp_path / "machine.py"
    script.write_text(MACHINE.format(script=str(TRAIN)))
    run_ranks(2, script, *SMALL, "--data", "set.zip", "--res", "16", "--steps", "1", "--out",
              tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").glob("listing*")) == \
        ["listing-0.pt", "listing-1.pt"] and not (tmp_path / "run/broken.txt").exists()


def test_ranks_of_a_machine_share_what_the_first_has_listed(tmp_path):
    write_folder(tmp_path / "set", 8)
    script = tmp_path / "counted.py"
    script.write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import listing
honest = listing.list_pictures
def counted(*args):
    print("rank", os.environ["RANK"], "lists")
    return honest(*args)
listing.list_pictures = counted
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    said = run_ranks(2, script, *SMALL, "--data", tmp_path / "set", "--res", "16", "--steps", "1",
                     "--out", tmp_path / "run")
    assert "rank 0 lists" in said and "rank 1 lists" not in said


def test_a_run_goes_on_with_other_links_but_not_with_other_names(tmp_path, little, capsys):
    write_folder(tmp_path / "set", 8)
    flags = ["--data", tmp_path / "set", "--res", "16", "--steps"]
    run_train(tmp_path / "run", *flags, "1")
    run_train(tmp_path / "run", *flags, "2", "--set", "follow_links=on")
    (tmp_path / "set/a/0.png").rename(tmp_path / "set/a/9.png")
    error = one_line(capsys, train.main, [*SMALL, *flags, "3", "--out", tmp_path / "run"])
    assert "pictures or classes of other names" in error


def test_pictures_are_kept_in_memory_only_if_all_of_them_fit_for_all_processes(
        tmp_path, monkeypatch):
    write_folder(tmp_path, 8, (16, 16))
    size = 16 * 16 * 3

    def kept(room, ranks="1"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setattr(data, "CACHE_BYTES", room * size)
        dataset = data.Pictures(tmp_path, 16)
        for n in range(8):
            dataset[n]
        return len(dataset.cache)

    assert [kept(8), kept(7), kept(16, "2"), kept(15, "2")] == [8, 0, 8, 0]
    workers = type("Info", (), dict(num_workers=4))
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: workers)
    assert [kept(64, "2"), kept(63, "2")] == [8, 0]


def test_captions_count_in_the_cache_and_are_read_up_to_a_limit(tmp_path, monkeypatch):
    write_folder(tmp_path, 2, (16, 16), classes=())
    (tmp_path / "0.txt").write_text("word " * 10**6)
    (tmp_path / "1.txt").write_text("é")
    monkeypatch.setattr(data, "CAPTION_BYTES", 1000)
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 16 * 16 * 3 + 500)
    dataset, start = data.Pictures(tmp_path, 16, tokens=lambda caption: [1]), time.time()
    assert dataset.captions(0) == [" ".join(["word"] * 200)] and dataset.captions(1) == ["é"]
    dataset.picture(0), dataset.picture(1)
    assert list(dataset.cache) == [0] and time.time() - start < 5
