"""Whether the Hub answers: found out in seconds, and the libraries use their cache alone inside the block only."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import huggingface_hub.constants
import pytest

from lowrank.io import network
from lowrank.io.hub import load_tokenizer
from lowrank.io.network import cache_if_unreachable, can_reach


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Refusing) as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture
def nobody() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def ask_anew(monkeypatch) -> None:
    monkeypatch.setattr(network, "_ANSWERS", {})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_any_answer_counts(server: str) -> None:
    assert can_reach(server)


def test_nobody_is_nobody(nobody: str) -> None:
    assert not can_reach(nobody)
    assert not can_reach("no address")


def test_a_server_that_is_silent_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not can_reach(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)


def test_an_answer_is_kept_for_a_while(nobody: str, monkeypatch) -> None:
    assert not can_reach(nobody)
    monkeypatch.setattr(network, "_ask", lambda *_: True)
    assert not can_reach(nobody)
    monkeypatch.setattr(network, "VALID", -1.0)
    assert can_reach(nobody)


def test_the_cache_is_used_inside_the_block_only(nobody: str, server: str, monkeypatch) -> None:
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    with cache_if_unreachable() as unreachable:
        assert unreachable
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server)
    with cache_if_unreachable() as unreachable:
        assert not unreachable
        assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_is_not_in_the_cache_is_an_error_without_retries(nobody: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with pytest.raises(FileNotFoundError, match=r"tokenizer 'no/such' could not be loaded: the Hub cannot be reached"):
        load_tokenizer("no/such")
