"""Folders on the Hub: fetch one at a pinned revision, and write one in a single commit."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lowrank.io.checks import require
from lowrank.io.hub import load_or_explain

COMMIT = re.compile("[0-9a-f]{40}")
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WANTED = ("*.json", "*.safetensors")  # nothing that would be unpickled or run


def fetch_folder(folder: Path | str, revision: str | None = None) -> Path:
    """Return a local folder as it is, or download that of a model on the Hub.

    What is in the cache is not downloaded again. A commit that is in the cache needs no network.

    **Arguments**

    - `folder`: the folder, or, if there is none and it is a string, a name on the Hub: "user/name".
    - `revision`: a commit, tag or branch of the Hub. Default: the newest commit.

    **Returns** the folder, for one of the Hub inside the cache at HF_HOME.

    **Raises**

    - `FileNotFoundError`: the Hub has no such model or revision, or cannot be reached.
    - `ValueError`: a revision of a local folder.
    """
    on_hub = isinstance(folder, str) and NAME.fullmatch(folder) is not None and not Path(folder).exists()
    if not on_hub:
        require(revision is None, "revision", f"be None for the local folder {str(folder)!r}", revision)
        return Path(folder)
    return Path(load_or_explain("model", str(folder), lambda: _download(str(folder), revision)))


def _download(name: str, revision: str | None) -> str:
    import huggingface_hub  # noqa: PLC0415

    fetch = partial(huggingface_hub.snapshot_download, name, revision=revision, allow_patterns=list(WANTED))
    if revision is not None and COMMIT.fullmatch(revision):
        try:
            return fetch(local_files_only=True)
        except FileNotFoundError:
            _ask(name, revision)
    return fetch()


def _ask(name: str, revision: str) -> None:
    """Fail at once if the Hub cannot be reached, where a download of a commit would try again and again."""
    import huggingface_hub  # noqa: PLC0415

    try:
        huggingface_hub.HfApi().model_info(name, revision=revision)
    except OSError:
        raise
    except Exception as error:  # of the transport, of any kind
        raise ConnectionError(str(error)) from error


def upload_files(
    files: Mapping[str, Path | bytes], repo: str, message: str, *, private: bool = False
) -> dict[str, str]:
    """Make a commit on the Hub after which a repository holds these files and no others; a new repository is made if needed.

    **Arguments**

    - `files`: name in the repository -> local file, or content.
    - `repo`: "user/name".
    - `message`: of the commit.
    - `private`: make a new repository private. One that exists stays as it is. Default False.

    **Returns** `repo`; `url`, of the commit; `revision`, its hash.

    **Raises**

    - `PermissionError`: no token, or one that may not write there.
    - `ConnectionError`: the Hub cannot be reached.
    - `OSError`: the Hub refuses the files.
    - `ValueError`: no name of a repository.
    """
    import huggingface_hub  # noqa: PLC0415

    require(NAME.fullmatch(repo) is not None, "repo", "be a name on the Hub like 'user/name'", repo)
    if huggingface_hub.get_token() is None:
        raise PermissionError(f"`repo` {repo!r} needs a token that may write: run `hf auth login`, or set HF_TOKEN.")
    hub = huggingface_hub.HfApi()
    with _explaining(repo):
        hub.create_repo(repo, private=private, exist_ok=True)
        left_over = set(hub.list_repo_files(repo)) - files.keys() - {".gitattributes"}
        adds = [huggingface_hub.CommitOperationAdd(path, content) for path, content in files.items()]
        deletes = [huggingface_hub.CommitOperationDelete(path) for path in sorted(left_over)]
        commit = hub.create_commit(repo, [*adds, *deletes], commit_message=message)
    return {"repo": repo, "url": commit.commit_url, "revision": commit.oid}


@contextmanager
def _explaining(repo: str) -> Iterator[None]:
    """Turn what the client of the Hub raises into an error of one line that names the repository."""
    try:
        yield
    except Exception as error:  # of any kind: it raises those of its transports too
        text = " ".join(str(error).split())[:300] or repr(error)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            rule = "be a repository that your token may write to; `hf auth login` or HF_TOKEN gives another"
            raise PermissionError(f"`repo` must {rule}, got {repo!r} ({text}).") from error
        if status is not None:
            raise OSError(f"{repo!r} could not be written: the Hub refused it ({text}).") from error
        if isinstance(error, ValueError):
            raise ValueError(f"`repo` must be a name on the Hub like 'user/name', got {repo!r} ({text}).") from error
        raise ConnectionError(f"{repo!r} could not be written: the Hub cannot be reached ({text}).") from error
