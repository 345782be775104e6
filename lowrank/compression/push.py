"""Push the folder of a compressed model to the Hub, after a check that it is whole."""

from pathlib import Path

from lowrank.compression.card import PLACE, format_card
from lowrank.compression.model_folder import CARD, FORMAT, METADATA, TENSORS
from lowrank.compression.pretrained import drop_placeholders
from lowrank.compression.record_schema import CompressedRecord
from lowrank.io.arguments import check_arguments
from lowrank.io.checks import require
from lowrank.io.files import open_safetensors
from lowrank.io.hashing import hash_tensors
from lowrank.io.records import read_record
from lowrank.io.snapshots import upload_files


@check_arguments
def push_compressed(
    folder: Path | str, repo: str, *, private: bool = False, message: str = "Add a compressed model"
) -> dict[str, str]:
    """Push a folder that `save_compressed` wrote to the Hub, in one commit; `load_compressed("user/name")` reads it again.

    The repository is made if there is none. Afterwards it holds the files of this folder and no others; hidden files and folders
    inside stay here. The model card names the repository. A push that fails leaves at most an empty new repository.

    **Arguments**

    - `folder`: the folder of a compressed model.
    - `repo`: "user/name".
    - `private`: make a new repository private. Default False.
    - `message`: of the commit.

    **Returns** `repo`; `url`, of the commit; `revision`, its hash, to pin: `load_compressed(repo, revision=...)`.

    **Raises**

    - `FileNotFoundError`, `ValueError`: before anything is sent: a folder that is no whole compressed model; no name of a
      repository.
    - `PermissionError`: no token, or one that may not write there.
    - `ConnectionError`, `OSError`: the Hub cannot be reached, or refuses the files.
    """
    folder = Path(folder)
    record = read_record(folder / METADATA, FORMAT, CompressedRecord, "save_compressed", "folder")
    with open_safetensors(folder / TENSORS, "folder") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    found = hash_tensors(drop_placeholders(tensors, record["layers"]), len(record["tensors"]))
    require(found == record["tensors"], "folder", f"have the tensors that its {METADATA} was written for", str(folder))
    needs_config = "transformers" in (record["base"] or {}) and not (folder / "config.json").is_file()
    require(not needs_config, "folder", "have the config.json of its model", str(folder))
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")
    }
    card = folder / CARD
    text = card.read_text(encoding="utf8") if card.is_file() else format_card(record)
    files[CARD] = text.replace(PLACE, repo).encode()
    return upload_files(files, repo, message, private=private)
