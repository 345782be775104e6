"""The site: every result and claim has its place, every link leads somewhere, and a browser shows it all without the web."""

import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from lowrank.io.dependencies import ROOT
from lowrank.report import parameters as parameters_module
from lowrank.report.__main__ import main
from lowrank.report.pages import STYLES, count_claims, escape, format_verdicts, notebook_page
from lowrank.report.parameters import jobs, notebook_names, read_parameters
from lowrank.report.reference import public_modules
from lowrank.report.result_files import read_claims
from lowrank.report.site import FIGURES, SiteError, build_site, find_results

SETS = re.search(r"^SETS +\?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf8"), flags=re.MULTILINE)[1].split()
OUTPUTS = ROOT / "outputs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the embedded sets."""
    folder = tmp_path_factory.mktemp("site") / "site"
    build_site(SETS, [OUTPUTS], folder)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, BeautifulSoup]:
    return {
        path: BeautifulSoup(path.read_text(encoding="utf8"), "html.parser") for path in sorted(site.rglob("*.html"))
    }


def words(text: str) -> str:
    return " ".join(text.split())


def test_every_result_has_a_page_that_the_start_page_leads_to(site: Path, pages) -> None:
    targets = {link["href"].partition("#")[0] for link in pages[site / "index.html"].find_all("a", href=True)}
    for name, notebook in jobs(SETS):
        assert f"results/{name}/{notebook}.html" in targets
        assert (site / "results" / name / f"{notebook}.html").is_file()


@pytest.mark.parametrize(("name", "notebook"), jobs(SETS))
def test_every_claim_appears_with_its_verdict(site: Path, pages, name: str, notebook: str) -> None:
    start, page = pages[site / "index.html"], pages[site / "results" / name / f"{notebook}.html"]
    claims = read_claims(OUTPUTS / name / notebook)
    for claim, verdict in claims[["claim", "verdict"]].itertuples(index=False):
        word = STYLES[verdict]
        for where, shown in ((start, f"results/{name}/{notebook}.html"), (page, None)):
            rows = [row for row in where.select("table tr") if words(row.td.text if row.td else "") == words(claim)]
            cells = [cell for row in rows for cell in row.select(f".{word}")]
            assert [cell for cell in cells if shown is None or cell.get("href") == shown], (claim, word)


@pytest.mark.parametrize(("name", "notebook"), jobs(SETS))
def test_a_page_says_what_went_in_and_where_it_came_from(site: Path, pages, name: str, notebook: str) -> None:
    page = pages[site / "results" / name / f"{notebook}.html"]
    about = yaml.safe_load((OUTPUTS / name / notebook / "run.json").read_text(encoding="utf8"))
    shown = {words(row.td.text): words(row.find_all("td")[1].text) for row in page.select("section table tr") if row.td}
    assert set(about["parameters"]) <= set(shown)
    assert shown["commit"] == about["git_commit"]
    assert shown["wall time"] == f"{about['wall_s']} s"
    assert {stage: shown.get(stage) for stage in about["stages_s"]} == {
        k: f"{v} s" for k, v in about["stages_s"].items()
    }
    assert "injected" not in page.text
    assert not [cell for cell in page.select(".cell_input") if re.match(r"set_name = ", cell.text.strip())]


def test_links_lead_somewhere(site: Path, pages) -> None:
    anchors = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    for path, page in pages.items():
        for tag in page.find_all(["a", "link", "script", "img", "iframe", "source"]):
            target = urlsplit(tag.get("href") or tag.get("src") or "")
            if target.scheme in {"http", "https"}:
                assert tag.name == "a", f"{path.name} loads {target.geturl()}"
            elif target.scheme not in {"data", "mailto"} and (target.path or target.fragment):
                file = (path.parent / unquote(target.path)).resolve() if target.path else path
                assert file.is_file(), f"{path.name}: {target.geturl()}"
                if target.fragment and file in anchors:
                    assert unquote(target.fragment) in anchors[file], f"{path.name}: {target.geturl()}"


def test_styles_load_nothing_from_the_web(site: Path) -> None:
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text(encoding="utf8")), path


def test_the_reference_has_what_modules_define(site: Path, pages) -> None:
    for name in public_modules():
        module = importlib.import_module(name)
        defined = {
            f"{name}.{key}"
            for key, value in vars(module).items()
            if (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == name
            and value.__name__ == key  # not another name of it
            and not key.startswith("_")
            and value.__doc__
            and not value.__doc__.startswith(f"{key}(")  # what dataclasses and named tuples write themselves
        }
        found = {tag["id"] for tag in pages[site / "reference" / f"{name}.html"].select("dt[id]")}
        assert defined <= found, name


def test_every_notebook_has_a_figure_for_the_start_page() -> None:
    assert sorted(FIGURES) == notebook_names()


# What a browser is asked of a page: pictures and formulas without a size, and whether a narrow page scrolls sideways.
SIZELESS = """() => [...document.querySelectorAll("article img, .math-inline svg, .math-block svg")].filter(shown => {
  const box = shown.getBoundingClientRect();
  return !(box.width > 1 && box.height > 1 && (shown.tagName != "IMG" || shown.naturalWidth > 1));
}).map(shown => shown.outerHTML.slice(0, 200))"""
HIDDEN = (
    """() => Math.max(...[...document.querySelectorAll("html, .content")].map(e => e.scrollWidth - e.clientWidth))"""
)


@pytest.fixture
def problems() -> list[tuple[str, ...]]:
    """What a browser complained about."""
    return []


@pytest.fixture(params=[1300, 400])
def tab(browser, request: pytest.FixtureRequest, problems) -> Iterator:
    """A window that is wide, or narrow, and writes down all that goes wrong in it."""
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    opened.on("console", lambda message: problems.append((opened.url, message.type, message.text)))
    opened.on("pageerror", lambda error: problems.append((opened.url, str(error))))
    opened.on("requestfailed", lambda asked: problems.append((opened.url, "failed", asked.url)))
    opened.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or problems.append((asked.url,)))
    yield opened
    opened.close()


def test_a_browser_shows_every_page_whole(pages, tab, problems) -> None:
    for path in pages:
        tab.goto(path.as_uri(), wait_until="load")
        problems += [(path.name, sizeless) for sizeless in tab.evaluate(SIZELESS)]
        if (hidden := tab.evaluate(HIDDEN)) > 0:
            problems.append((path.name, f"{hidden} pixels wider than the window"))
    assert not problems


def test_the_search_finds_pages_from_disk(site: Path, tab, problems) -> None:
    tab.goto((site / "search.html").as_uri() + "?q=whitened")
    tab.wait_for_selector("#search-results .search-summary:has-text('found')")
    found = tab.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
    assert any(link.partition("#")[0].endswith("01_whitening.html") for link in found)
    assert not problems


def test_formulas_and_figures_are_those_of_the_notebooks(site: Path, pages) -> None:
    for name, notebook in jobs(SETS):
        page = pages[site / "results" / name / f"{notebook}.html"]
        stored = nbformat.read(OUTPUTS / name / notebook / f"{notebook}.ipynb", 4)
        prose = "\n".join(re.sub(r"`[^`]*`", "", cell.source) for cell in stored.cells if cell.cell_type == "markdown")
        formulas = re.findall(r"\$\$.+?\$\$|\$.+?\$", prose, flags=re.DOTALL)
        figures = [o for cell in stored.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        assert len(page.select("article section .math-inline, article section .math-block")) == len(formulas) > 0
        assert len(page.select(".cell_output img")) == len(figures) > 0


def failing(capsys: pytest.CaptureFixture[str], *sets: str) -> str:
    assert main(["site", *sets]) == 2
    return capsys.readouterr().err


def test_missing_results_are_named_with_the_remedy(outputs: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lowrank.report.site.SITE", tmp_path / "site")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("the former one")
    shutil.copytree(OUTPUTS / "docs-llama", outputs / "docs-llama")
    assert 'run `make report SETS="docs-llama@seed=1"` first.' in failing(capsys, "docs-llama", "docs-llama@seed=1")
    (outputs / "docs-llama" / "02_prehab" / "claims.csv").unlink()
    assert "02_prehab must have claims.csv, and has none: run `make report" in failing(capsys, "docs-llama")
    assert "error: `set` must be one of ['cifar10-dinov2'" in failing(capsys, "no-such-set")
    assert "error: `sets` must name at least one set, got none." in failing(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"site", "outputs"}
    assert (tmp_path / "site" / "index.html").read_text() == "the former one"


def test_own_runs_of_a_set_come_before_published_results(tmp_path: Path) -> None:
    shutil.copytree(OUTPUTS / "docs-llama", tmp_path / "docs-llama")
    found = find_results(["docs-llama", "scenes-pi3"], [tmp_path, OUTPUTS])
    assert found["01_whitening"] == {"docs-llama": tmp_path / "docs-llama" / "01_whitening"}
    assert found["07_pi3_efficiency"] == {"scenes-pi3": OUTPUTS / "scenes-pi3" / "07_pi3_efficiency"}
    shutil.rmtree(tmp_path / "docs-llama" / "02_prehab")
    with pytest.raises(SiteError, match="02_prehab must have run.json"):  # never half own, half published
        find_results(["docs-llama"], [tmp_path, OUTPUTS])


def test_what_sphinx_warns_of_leaves_the_former_site(tmp_path: Path, capfd) -> None:
    outputs, target = tmp_path / "outputs", tmp_path / "site"
    shutil.copytree(OUTPUTS / "scenes-pi3", outputs / "scenes-pi3")
    path = outputs / "scenes-pi3" / "07_pi3_efficiency" / "07_pi3_efficiency.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("[a page](nowhere.md)", id="broken"))
    nbformat.write(notebook, path)
    target.mkdir()
    (target / "index.html").write_text("the former one")
    with pytest.raises(SiteError, match="Sphinx failed or warned"):
        build_site(["scenes-pi3"], [outputs], target)
    assert "nowhere.md" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"site", "outputs"}
    assert [path.name for path in target.iterdir()] == ["index.html"]


def test_pages_need_no_kernel(tmp_path: Path) -> None:
    folder = OUTPUTS / "digits-vit" / "04_stability"
    stored = nbformat.read(folder / "04_stability.ipynb", 4)
    page = notebook_page(folder, "digits-vit", "04_stability")
    assert "widget-view" in nbformat.writes(stored)
    assert "widget-view" not in nbformat.writes(page)
    assert page.cells[0].source.partition("\n")[0].endswith("(digits-vit)")
    nbformat.validate(page)


def test_no_mark_of_a_filled_block_is_shown(pages) -> None:
    own = {path: page for path, page in pages.items() if path.parent.name != "reference"}
    assert not [path.name for path, page in own.items() if "<!--" in page.get_text()]


CLAIMS = """id,claim,verdict,effect,low,high,unit,n,margin,p
a,first,supported,0.123,0.1,0.15,nats,5,0,0.001
b,second,refuted,-2,-3,-1,points,3,0,0.01
c,third,inconclusive,0.5,,,nats,1,0,1
"""


def test_effects_beside_a_claim_are_shown(tmp_path: Path) -> None:
    (tmp_path / "claims.csv").write_text(CLAIMS)
    assert format_verdicts(read_claims(tmp_path)) == [
        r"[supported]{.supported}: +0.123 nats \[0.1, 0.15\], n = 5",
        r"[refuted]{.refuted}: -2 points \[-3, -1\], n = 3",
        "[inconclusive]{.inconclusive}: +0.5 nats, n = 1",
    ]
    assert format_verdicts(read_claims(tmp_path), "a.md")[1].startswith("[refuted](a.md){.refuted}: ")
    assert count_claims(read_claims(tmp_path)) == "1 of 3 supported"


def test_text_is_shown_unchanged() -> None:
    assert escape("||W||_F <= 1 | $x$ `y` [z]{.a} *b*") == (r"\|\|W\|\|\_F \<= 1 \| \$x\$ \`y\` \[z\]\{.a\} \*b\*")


@pytest.mark.parametrize("page", ["own-data", "gpu-set"])
def test_the_sets_of_how_tos_fit_the_notebooks(page: str, tmp_path: Path, monkeypatch) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "own.yaml").write_text(example)
    monkeypatch.setattr(parameters_module, "SETS", tmp_path)
    found = jobs(["own"])
    assert found
    for _, notebook in found:
        assert read_parameters("own", notebook)["set_name"] == "own"
