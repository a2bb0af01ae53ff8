"""docs/annotate.py: pages of code and prose that hold what is in the sources, and nothing else."""
import ast
import re
from html.parser import HTMLParser

import pytest

from tests.helpers import HERE, PYTHON, run_script

pytest.importorskip("pygments")
pytest.importorskip("latex2mathml")
FILES = "schedule.py", "loss.py", "wavelet.py", "uvit.py", "sample.py", "train.py"


class Reader(HTMLParser):
    """Text of a page by kind: prose, code, math; what it links to."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.links, self.open = dict(prose="", code="", math="", head=""), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        kind = {"math": "math", "head": "head", "nav": "head", "h1": "head", "h3": "head"}.get(
            tag, "code" if attributes.get("class") == "code" else None)
        if tag not in ("meta", "img", "br"):
            self.open.append(kind or (self.open[-1] if self.open else "prose"))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        self.texts[self.open[-1] if self.open else "prose"] += f"{data}\n" * bool(data.strip()) \
            if self.open and self.open[-1] == "prose" else data


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    run_script(*PYTHON, "docs/annotate.py", folder)
    return {file: folder / file.replace(".py", ".html") for file in FILES}


def docstrings(source):
    return [ast.get_docstring(node) for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node)]


def words(text):
    return sorted(re.findall(r"\w+", text))


@pytest.mark.parametrize("file", FILES)
def test_page_holds_the_prose_and_the_code_of_its_file_and_no_more(pages, file):
    from docs.annotate import FORMULAS
    source, read = (HERE / file).read_text(), Reader(pages[file].read_text())
    prose, code, found = " ".join(docstrings(source)), source, read.texts
    prose = re.sub(r"[ \n]+", " ", prose)
    for formula in sorted(FORMULAS, key=len, reverse=True):
        prose = prose.replace(formula, " ")
    headings = re.findall(r"^# -{10,} (.*)$", source, re.MULTILINE)
    assert words(found["prose"]) == words(prose + " ".join(headings))
    for docstring in re.findall(r'^ *"""(?:.|\n)*?"""$', code, re.MULTILINE):
        code = code.replace(docstring, "", 1)
    code = re.sub(r"^# -{10,} .*$", "", code, flags=re.MULTILINE)
    assert found["code"].split() == code.split()


def test_every_formula_is_in_a_docstring_and_set_as_mathematics(pages):
    from latex2mathml.converter import convert

    from docs.annotate import FORMULAS
    prose = re.sub(r"[ \n]+", " ", " ".join(part for file in FILES
                                            for part in docstrings((HERE / file).read_text())))
    assert not [formula for formula in FORMULAS if formula not in prose]
    shown = "".join(page.read_text() for page in pages.values())
    assert not [latex for latex in FORMULAS.values() if convert(latex) not in shown]
    assert "\\" not in "".join(Reader(page.read_text()).texts["math"] for page in pages.values())


@pytest.mark.parametrize("file", FILES)
def test_links_and_figures_of_a_page_exist(pages, file):
    links = Reader(pages[file].read_text()).links
    assert len(links) >= 6
    assert not [link for link in links if not (pages[file].parent / link).exists()]
