"""The files of the paper as pages: prose and equations on the left, code on the right.

    pip install pygments latex2mathml
    python docs/annotate.py [FOLDER]            FOLDER/schedule.html, ... (default: docs/pages)

All text is that of the sources: a docstring stands beside the code that follows it, formulas in it
are set as such, and the figures of the README stand where they belong.
"""
import argparse
import ast
import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HERE = Path(__file__).parent.parent
FILES = "schedule.py", "loss.py", "wavelet.py", "uvit.py", "sample.py", "train.py"
FIGURES = {"logsnr_shifted": "figure3.webp", "logsnr_interpolated": "figure5.webp",
           "dwt": "figure7.webp"}

# Formulas as the docstrings have them, and in LaTeX.
FORMULAS = {
    "z_t = alpha_t x + sigma_t eps": r"z_t = \alpha_t x + \sigma_t \epsilon",
    "alpha_t^2 + sigma_t^2 = 1": r"\alpha_t^2 + \sigma_t^2 = 1",
    "logsnr(t) = log(alpha_t^2 / sigma_t^2)":
        r"\mathrm{logsnr}(t) = \log (\alpha_t^2 / \sigma_t^2)",
    "2 log(d / noise_d)": r"2 \log (d / \mathrm{noise\_d})",
    "alpha = cos(pi t / 2)": r"\alpha = \cos (\pi t / 2)",
    "SNR_cosine(t) (noise_d / d)^2":
        r"\mathrm{SNR}_{\mathrm{cosine}}(t) \, (\mathrm{noise\_d} / d)^2",
    "alpha^2 = sigmoid(logsnr)": r"\alpha^2 = \mathrm{sigmoid}(\mathrm{logsnr})",
    "sigma^2 = sigmoid(-logsnr)": r"\sigma^2 = \mathrm{sigmoid}(-\mathrm{logsnr})",
    "v = alpha eps - sigma x": r"v = \alpha \epsilon - \sigma x",
    "x = alpha z_t - sigma v": r"x = \alpha z_t - \sigma v",
    "eps = sigma z_t + alpha v": r"\epsilon = \sigma z_t + \alpha v",
    "eps = sigma z + alpha v": r"\epsilon = \sigma z + \alpha v",
    "t ~ U(0, 1)": r"t \sim U(0, 1)",
    "sum over s in {32, 64, ..., d} of (1/s) L^{s x s}":
        r"\sum_{s \in \{32, 64, \dots, d\}} \frac{1}{s} L^{s \times s}",
    "L^{s x s} = 1/s^2 || D_s[eps - eps_hat] ||^2":
        r"L^{s \times s} = \frac{1}{s^2} \| D_s [\epsilon - \hat{\epsilon}] \|^2",
    "(s/d)^2": r"(s / d)^2",
    "eps - eps_hat = alpha (v - v_hat)": r"\epsilon - \hat{\epsilon} = \alpha (v - \hat{v})",
    "d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2":
        r"d[n] = x[2n+1] - \frac{1}{2} (x[2n] + x[2n+2])",
    "s[n] = x[2n] + (d[n-1] + d[n]) / 4": r"s[n] = x[2n] + \frac{1}{4} (d[n-1] + d[n])",
    "x[N] = x[N-2]": r"x[N] = x[N-2]",
    "d[-1] = d[0]": r"d[-1] = d[0]",
    "h (1 + scale) + shift": r"h (1 + \mathrm{scale}) + \mathrm{shift}",
    "mu = alpha_s (z_t (1 - c) / alpha_t + c x_hat)":
        r"\mu = \alpha_s (z_t (1 - c) / \alpha_t + c \hat{x})",
    "c = 1 - SNR_t / SNR_s": r"c = 1 - \mathrm{SNR}_t / \mathrm{SNR}_s",
    "c sigma_s^2": r"c \sigma_s^2",
    "c sigma_t^2": r"c \sigma_t^2",
    "asinh((logsnr - m) / width)": r"\mathrm{asinh}((\mathrm{logsnr} - m) / \mathrm{width})",
    "eps_hat = (1 + eta) eps_cond - eta eps_uncond":
        r"\hat{\epsilon} = (1 + \eta) \epsilon_{\mathrm{cond}} - \eta \epsilon_{\mathrm{uncond}}",
    "guidance = 1 + eta": r"\mathrm{guidance} = 1 + \eta",
    "cos(f pi / 2) a + sin(f pi / 2) b": r"\cos (f \pi / 2) \, a + \sin (f \pi / 2) \, b",
    "step / (9 + step)": r"\mathrm{step} / (9 + \mathrm{step})",
}

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --faint: #e4e4e4; --code: #f7f7f7; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #ddd; --faint: #333; --code: #1d2025; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
       margin: 0 auto; padding: 0 1rem; max-width: 100rem; }
nav a { margin-right: 1rem; } a { color: inherit; }
section { border-top: 1px solid var(--faint); display: grid; gap: 0 2rem;
          grid-template-columns: minmax(0, 1fr); }
p { max-width: 45rem; }
@media (min-width: 75rem) {
  section:not(#top) { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); } }
.code { background: var(--code); overflow-x: auto; padding: 0 .8rem; font-size: .8rem; }
.block { white-space: pre; overflow-x: auto; font: .85rem/1.5 monospace; }
.block math { font-size: 1.15rem; line-height: 2; }
h2, h3 { margin: .8rem 0 0; } img { max-width: 100%; } pre { line-height: 1.4; }
"""


def sections(source):
    """-> [(heading above it or "", name, docstring, code without it), ...], from top to bottom."""
    tree, lines = ast.parse(source), source.splitlines()
    nodes = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    nodes += [part for node in nodes if isinstance(node, ast.ClassDef) for part in node.body
              if isinstance(part, ast.FunctionDef) and ast.get_docstring(part)]
    starts = {min([node.lineno, *(d.lineno for d in node.decorator_list)]): node for node in nodes}
    starts = {1: tree} | dict(sorted(starts.items()))
    found, heading = [], ""
    for (start, node), end in zip(starts.items(), [*list(starts)[1:], len(lines) + 1]):
        docstring = ast.get_docstring(node) or ""
        of_docstring = range(node.body[0].lineno, node.body[0].end_lineno + 1) if docstring else ()
        code = [lines[i - 1] for i in range(start, end) if i not in of_docstring]
        here, heading = heading, ""
        for line in code:
            divider = re.fullmatch(r"# -{10,} (.*)", line)
            heading = divider[1] if divider else heading
        code = [line for line in code if not line.startswith("# -----")]
        name = node.name if hasattr(node, "name") else ""
        found.append((here, name, docstring, "\n".join(code).strip("\n")))
    return found


def formulas(text):
    """HTML of prose: formulas as MathML, `names` as code."""
    longest_first = sorted(FORMULAS, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + "|`[^`]+`)", text)
    return "".join(convert(FORMULAS[part]) if part in FORMULAS else
                   f"<code>{html.escape(part[1:-1])}</code>" if part[:1] == "`" else
                   html.escape(part) for part in parts)


def prose(docstring):
    """HTML of a docstring: paragraphs; what is indented keeps its lines."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", docstring) if docstring else []:
        if all(line.startswith("    ") for line in paragraph.splitlines()):
            blocks.append(f'<div class="block">{formulas(paragraph)}</div>')
        else:                   # "t: (B,) in [0, 1]" begins a line of its own
            text = re.sub(r"\n(?!\S+(, \S+)*: )", " ", paragraph).replace(" -> ", " \u2192 ")
            blocks.append(f"<p>{formulas(text)}</p>".replace("\n", "<br>"))
    return "".join(blocks)


def page(file, assets, names=FILES):
    """-> HTML of a source file; assets: where the figures are, as a link from the page."""
    code_style = HtmlFormatter(style="default").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
    rows = []
    for heading, name, docstring, code in sections((HERE / file).read_text(encoding="utf-8")):
        title = f"<h2>{html.escape(heading)}</h2>" * bool(heading)
        title += f"<h3>{name}</h3>" * bool(name)
        if name in FIGURES:
            number = FIGURES[name][6]
            figure = f'<img src="{assets}/{FIGURES[name]}" alt="Figure {number} of the paper">'
        else:
            figure = ""
        rows.append(f'<section id="{name or "top"}"><div>{title}{prose(docstring)}{figure}</div>'
                    f'<div class="code">{highlight(code, PythonLexer(), HtmlFormatter())}</div>'
                    "</section>")
    links = " ".join(f'<a href="{Path(name).stem}.html">{name}</a>' for name in names)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{file}</title><style>'
            f"{code_style}\n@media (prefers-color-scheme: dark) {{ {dark} }}{STYLE}</style></head>"
            f"<body><nav>{links}</nav><h1>{file}</h1>{''.join(rows)}</body></html>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "docs" / "pages")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    assets = Path(os.path.relpath(HERE / "assets", folder)).as_posix()
    for file in FILES:
        target = folder / f"{Path(file).stem}.html"
        target.write_text(page(file, assets), encoding="utf-8")
        print(target)


if __name__ == "__main__":
    main()
