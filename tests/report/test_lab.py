"""The first hour in JupyterLab, in a real browser: `make lab`, open a notebook, change parameters, run all."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from processes import copy_project

SMALLER = {
    "task_options": '{"width": 16, "depth": 2}',
    "steps": "60",
    "calibration_samples": "256",
    "theorem_samples": "64",
    "held_out_tokens": "512",
    "rank_shares": "[0.25]",
}
CHANGE = """smaller => {
    const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
    const at = [...Array(cells.length).keys()].find(i => (cells.get(i).getMetadata("tags") || []).includes("parameters"));
    const lines = cells.get(at).sharedModel.getSource().split("\\n").map(line => {
        const name = line.split(" = ")[0];
        return name in smaller ? `${name} = ${smaller[name]}` : line;
    });
    cells.get(at).sharedModel.setSource(lines.join("\\n"));
}"""
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
OUTPUTS = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.model.cells, kinds = [];
    for (let i = 0; i < cells.length; i++)
        for (const output of cells.get(i).sharedModel.outputs || []) kinds.push(output.output_type);
    return kinds;
}"""


@pytest.fixture
def lab(tmp_path: Path):
    """The address of a JupyterLab that `make lab` has started in a copy of the project, and the copy."""
    house = copy_project(tmp_path / "house")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "config").mkdir()
    options = {"ip": "127.0.0.1", "port": port, "open_browser": False, "allow_root": True}
    about = {"ServerApp": options, "IdentityProvider": {"token": ""}, "LabApp": {"expose_app_in_browser": True}}
    (tmp_path / "config" / "jupyter_server_config.json").write_text(json.dumps(about))
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "PYTHONPATH": str(house),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    environment.pop("LOWRANK_OUTPUTS", None)
    with (tmp_path / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            ["make", "-o", ".venv/.ok", "lab"],
            cwd=house,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield f"http://127.0.0.1:{port}/lab/tree/notebooks/01_whitening.py", house
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=60)


def test_a_notebook_is_opened_changed_and_run(lab, browser) -> None:
    address, house = lab
    page = browser.new_page()
    for _ in range(120):
        with socket.socket() as server:
            if server.connect_ex(("127.0.0.1", urlsplit(address).port)) == 0:
                break
        page.wait_for_timeout(500)
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-MarkdownOutput mjx-container", timeout=120_000)  # formulas, offline
    assert page.evaluate(OUTPUTS)  # of the pair, before anything is run
    page.wait_for_function(f"() => {KERNEL}?.status === 'idle'", timeout=120_000)  # without one, nothing would be run
    page.evaluate(CHANGE, SMALLER)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    drafts = house / "outputs" / "draft"
    for _ in range(800):
        if any(drafts.glob("*/*/run.json")) or "error" in page.evaluate(OUTPUTS):
            break
        page.wait_for_timeout(500)
    assert "error" not in page.evaluate(OUTPUTS)
    (result,) = drafts.glob("digits-vit@*/01_whitening")  # a combination of its own, not what the set says
    about = json.loads((result / "run.json").read_text())
    assert about["parameters"]["steps"] == 60
    assert about["parameters"]["task_options"] == {"width": 16, "depth": 2}
    assert len(list(result.glob("*.png"))) >= 3
