"""Whether the hub can be reached is asked once, and off line nothing waits for it."""

from __future__ import annotations

import os
import re
import socket
import time

import pytest
from huggingface_hub import constants

from sdpo.common import hub
from sdpo.models.locations import reader_of


@pytest.fixture
def server(monkeypatch):
    """A place that listens, as the hub; the network is taken to be there."""
    hub.look_for_hub.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield listening
    hub.look_for_hub.cache_clear()


def offline() -> bool:
    assert (os.environ["HF_HUB_OFFLINE"] == "1") is constants.HF_HUB_OFFLINE
    return constants.HF_HUB_OFFLINE


def test_hub_that_answers(server, caplog):
    hub.look_for_hub()
    assert not offline()
    assert not caplog.records


def test_hub_out_of_reach(server, caplog):
    server.close()
    began = time.monotonic()
    read = reader_of("org/name", None, None)
    assert read("unet/config.json") is read("model_index.json") is None
    assert time.monotonic() - began < 10
    assert offline()
    (record,) = caplog.records
    assert "cannot be reached" in record.message
    assert "HF_HUB_OFFLINE=1" in record.message


def test_a_hub_that_answers_late_is_tried_again(server, monkeypatch):
    connect, calls = socket.create_connection, []

    def late(*args):
        calls.append(args)
        if len(calls) == 1:
            raise TimeoutError
        return connect(*args)

    monkeypatch.setattr(socket, "create_connection", late)
    hub.look_for_hub()
    assert len(calls) == 2
    assert not offline()


def test_a_proxy_is_taken_to_reach_it(server, monkeypatch):
    server.close()
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    hub.look_for_hub()
    assert not offline()


def test_whatever_downloads_looks_for_it_first(repo):
    calls = "hf_hub_download|snapshot_download|HfFileSystem|load_dataset_builder"
    downloads = re.compile(rf"\b({calls})\(")
    texts = {path: path.read_text() for path in (repo / "sdpo").rglob("*.py")}
    found = [path for path, text in texts.items() if downloads.search(text)]
    assert len(found) > 4
    for path in found:
        assert " look_for_hub()" in texts[path], path
