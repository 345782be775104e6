"""Find out at once whether the Hub can be reached, so that nobody waits for retries that cannot succeed."""

import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 4.0  # to wait for the Hub; a name server that is not there may take ten times as long to say so
VALID = 60.0  # seconds that an answer counts
HUB = "https://huggingface.co"
_ANSWERS: dict[str, tuple[float, bool]] = {}  # address -> when it was asked, and whether it answered


def is_offline() -> bool:
    """Return True if the user has asked not to use the network."""
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def can_reach(address: str, seconds: float = SECONDS) -> bool:
    """Return True if a web server answers at an address, whatever it says; proxies of the environment are used.

    **Arguments**

    - `address`: a URL.
    - `seconds`: how long to wait. Default 4.
    """
    asked, answer = _ANSWERS.get(address, (float("-inf"), False))
    if time.monotonic() - asked > VALID:
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(_ask(address, seconds)), daemon=True)
        thread.start()
        thread.join(seconds)  # the limit of a connection does not count looking up its name
        answer = bool(answers and answers[0])
        _ANSWERS[address] = time.monotonic(), answer
    return answer


def _ask(address: str, seconds: float) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the libraries may know more certificates
    except (OSError, ValueError):
        return False
    return True


def _endpoint() -> str:
    """Return the address of the Hub that the libraries use, which they read once, when they are imported."""
    read = sys.modules.get("huggingface_hub.constants")
    return read.ENDPOINT if read is not None else os.environ.get("HF_ENDPOINT") or HUB


@contextmanager
def cache_if_unreachable() -> Iterator[bool]:
    """Let the libraries that load from the Hub use their cache alone inside a `with` block, if the Hub does not answer.

    The same holds if the user has set HF_HUB_OFFLINE, which the libraries read once, when they are imported.

    **Returns** whether the Hub does not answer; False if the user has set HF_HUB_OFFLINE, and nobody has asked.
    """
    offline = is_offline()
    if not offline and can_reach(_endpoint()):
        yield False
        return
    import huggingface_hub.constants  # noqa: PLC0415

    holders = [huggingface_hub.constants, sys.modules.get("datasets.config")]  # each holds its own copy of the setting
    former = [(holder, holder.HF_HUB_OFFLINE) for holder in holders if holder is not None]
    try:
        for holder, _ in former:
            setattr(holder, "HF_HUB_OFFLINE", True)  # noqa: B010 (a constant, to type checkers)
        yield not offline
    finally:
        for holder, value in former:
            setattr(holder, "HF_HUB_OFFLINE", value)  # noqa: B010
