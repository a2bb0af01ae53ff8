"""The scripts of docs/data.md, each run on small stand-ins for the sets that they name."""
import io
import re
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import Pictures
from tests.helpers import HERE

HUGGING_FACE, TORCHVISION, WEBDATASET, IMAGENET, SMALLER = re.findall(
    r"```python\n(.*?)```", (HERE / "docs/data.md").read_text(), re.S)


def picture(colour, kind="PNG", size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **dict(quality=95) if kind == "JPEG" else {})
    return file.getvalue()


def tar(files):
    """{name: bytes} -> a tar of them, as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script) -> {picture of the zip it wrote: (class, mean colour)}, its captions."""
    monkeypatch.chdir(tmp_path)

    def run(script, made="mine.zip"):
        exec(script, {})
        pictures, found = Pictures(made, 16), {}
        for i, name in enumerate(pictures.names):
            (pixels, _, _), _ = pictures.picture(i)
            label = pictures.listing.labels[i]
            colour = tuple(np.asarray(pixels).mean((0, 1)).round().astype(int).tolist())
            found[name] = pictures.classes[label] if label >= 0 else None, colour
        with zipfile.ZipFile(made) as archive:
            texts = {name: archive.read(name).decode() for name in archive.namelist()
                     if name.endswith(".txt")}
        return found, texts
    return run


RED, BLUE = (250, 0, 0), (0, 0, 250)


def test_hugging_face(tmp_path, run, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for name, colour in (("cat", RED), ("dog", BLUE)):
        (tmp_path / "hf" / name).mkdir(parents=True)
        (tmp_path / "hf" / name / "a.png").write_bytes(picture(colour))
    assert 'load_dataset("DATASET", split="train")' in HUGGING_FACE
    script = HUGGING_FACE.replace('"DATASET"', f'"imagefolder", data_dir={str(tmp_path / "hf")!r}')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert run(script) == ({"cat/0000000.png": ("cat", RED), "dog/0000001.png": ("dog", BLUE)}, {})


def test_torchvision(run, monkeypatch):
    class Stub(list):
        classes = ["airplane", "bird"]

        def __init__(self, root, download):
            super().__init__([(Image.new("RGB", (32, 32), BLUE), 1),
                              (Image.new("RGB", (32, 32), RED), 0)])
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(CIFAR10=Stub))
    assert run(TORCHVISION)[0] == {"airplane/0000001.png": ("airplane", RED),
                                   "bird/0000000.png": ("bird", BLUE)}


def test_webdataset(tmp_path, run):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(tar({
        "x/a.b.PNG": picture(RED), "x/a.cls": b"7\n", "y/a.cls": b"3", "y/a.PNG": picture(BLUE)}))
    (tmp_path / "shards/1.tar").write_bytes(tar({
        "x/a.png": picture(BLUE), "x/a.txt": b"a blue square", "x/a.json": b"{}"}))
    assert run(WEBDATASET) == ({"7/0-x-a.png": ("7", RED), "3/0-y-a.png": ("3", BLUE),
                                "1-x-a.png": (None, BLUE)}, {"1-x-a.txt": "a blue square"})


def test_imagenet_and_smaller(tmp_path, run):
    large = picture((200, 100, 50), "JPEG", (1500, 1200))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar({
        "n01.tar": tar({"n01_1.JPEG": large, "n01_2.JPEG": picture(RED, "JPEG")}),
        "n02.tar": tar({"n02_1.JPEG": picture(BLUE, "JPEG")})}))
    found, _ = run(IMAGENET)
    assert {name: label for name, (label, _) in found.items()} == {
        "n01/n01_1.JPEG": "n01", "n01/n01_2.JPEG": "n01", "n02/n02_1.JPEG": "n02"}
    smaller, _ = run(SMALLER, "small.zip")
    assert smaller.keys() == found.keys()
    assert all(np.abs(np.subtract(smaller[name][1], found[name][1])).max() <= 3 for name in found)
    with zipfile.ZipFile("small.zip") as archive:
        sizes = [Image.open(archive.open(name)).size for name in archive.namelist()]
    assert sizes == [(640, 512), (40, 30), (40, 30)]
