"""The notebook, executed from top to bottom with less to do."""
import json
import shutil

import pytest

from tests.helpers import HERE, write_folder

NOTEBOOK = HERE / "notebooks" / "simple_diffusion.ipynb"
LESS = {"--n 20": "--n 2 --steps 2", 'train("runs/notebook")':
        'train("runs/notebook", "--steps", "4", "--sample-every", "2", "--batch", "4")',
        'PICTURES = ""': 'PICTURES, MINUTES = "pictures", .01'}


def test_notebook_is_kept_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None


def test_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for file in [*HERE.glob("*.py"), HERE / "requirements.txt"]:
        shutil.copy(file, tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "assets").symlink_to(HERE / "assets")
    write_folder(tmp_path / "pictures", 16)
    text = NOTEBOOK.read_text()
    for usual, less in LESS.items():
        assert json.dumps(usual)[1:-1] in text
        text = text.replace(json.dumps(usual)[1:-1], json.dumps(less)[1:-1])
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=dict(
        metadata=dict(path=str(tmp_path / "notebooks")))).execute()
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    shown = [[part for part in cell if "image/png" in part.get("data", {})] for cell in outputs]
    printed = "".join(part.get("text", "") for cell in outputs for part in cell)
    # Samples, the run, its losses, samples of it, Figures 3, 5 and 7.
    assert sum(map(bool, shown)) == 7, printed
    assert float(printed.split("of the inverse: ")[1].split()[0]) < 1e-5
    assert "done: runs/notebook/grid.png" in printed and (tmp_path / "train.log").exists()
