"""Remove what ties an executed notebook to one machine: absolute paths, and papermill's copy of the source."""

import os
import re
from pathlib import Path
from typing import Any

from lowrank.io.dependencies import ROOT


def _folders() -> dict[str, str]:
    """Return the folders of this machine that a text may name, and the text to write for each."""
    variables = {name: os.environ.get(name) for name in ("HF_HOME", "LOWRANK_CACHE", "LOWRANK_OUTPUTS")}
    folders = {str(ROOT): "."} | {path: f"${name}" for name, path in variables.items() if path}
    return {path: shown for path, shown in (folders | {str(Path.home()): "~"}).items() if path != "/"}


def shorten_paths(text: str) -> str:
    """Replace the folders of this machine in a text: the project by nothing, the home folder by `~`, `HF_HOME` by its name."""
    text = text.replace(f"{ROOT}/", "")
    for folder, shown in _folders().items():
        text = re.sub(rf"(?<![\w.]){re.escape(folder)}(?![\w.-])", shown, text)
    return re.sub(r"\S*/ipykernel_\d+/\d+\.py", "<cell>", text)


def make_portable(notebook: Any, source: str, target: str) -> Any:
    """Write relative paths into the metadata and the printed text of an executed notebook.

    **Arguments**

    - `notebook`: notebook object; it is changed.
    - `source`: path of its source, relative to the project.
    - `target`: path of its result, relative to the folder of results.

    **Returns** the same notebook object.
    """
    if papermill := notebook.metadata.get("papermill"):
        papermill.update(input_path=source, output_path=target)  # papermill puts the whole source there
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output["text"] = shorten_paths(output["text"])
            elif "text/plain" in output.get("data", {}):
                output["data"]["text/plain"] = shorten_paths(output["data"]["text/plain"])
    return notebook
