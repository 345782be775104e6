"""How Sphinx makes the site; `python -m lowrank.report site` calls it on a copy of this folder."""

import re
from xml.etree.ElementTree import tostring

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from ziamath import Latex

TEXT_SIZE, FORMULA_SIZE = 16, 17.5  # the letters of formulas are smaller at the same size
ziamath.config.svg2, ziamath.config.precision = False, 2  # each picture whole in itself, and small

project = html_title = "lowrank"
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["README.md"]  # included in part

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_domain_indices = False  # reference/ lists the modules by package
html_show_search_summary = False  # a page opened from disk may not read others
html_math_renderer = "pictures"
python_maximum_signature_line_length = 100
smartquotes = False  # W' is a letter of a formula

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_dmath_double_inline = True  # as Jupyter has it, display formulas within a paragraph
myst_heading_anchors = 3
myst_disable_syntax = ["html_block", "html_inline"]  # `<scene>` in a docstring is text

nb_execution_mode = "off"  # papermill executed them
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars; the executed notebook keeps them
nb_ipywidgets_js = {}  # they would come from the web


def formula(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Formulas as pictures that grow with the text: no script, no font, nothing to load, the same in every browser."""
    kind = "block" if isinstance(node, nodes.math_block) else "inline"
    tex = re.sub(r"\\mathbb (\w)", r"\\mathbb{\1}", node.astext())  # ziamath wants the braces
    drawn = Latex(tex, size=FORMULA_SIZE, inline=kind == "inline", color="currentColor")
    picture = drawn.svgxml()
    for side in ("width", "height"):
        picture.set(side, f"{float(picture.get(side, 0)) / TEXT_SIZE:.3f}em")
    picture.set("role", "img")
    picture.set("aria-label", node.astext())
    picture.set("style", f"vertical-align: {drawn.getyofst() / TEXT_SIZE:.3f}em")
    self.body.append(f'<span class="math-{kind}">{tostring(picture, encoding="unicode")}</span>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("pictures", (formula, None), (formula, None))
