"""Reading a base's configuration files."""

from __future__ import annotations

import json

import huggingface_hub

from sdpo.models.locations import reader_of


def test_the_hub_is_asked_once_for_a_file_that_is_there(tmp_path, monkeypatch):
    asked = []

    def download(name, file, revision, cache_dir):
        asked.append(file)
        if file == "no.json":
            raise OSError("no network")
        (tmp_path / file).write_text(json.dumps({"revision": revision}))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for revision in ("a", "b"):
        for _ in range(2):
            read = reader_of("org/of-this-test", revision, str(tmp_path))
            assert read("yes.json") == {"revision": revision}
    assert asked == ["yes.json", "yes.json"]
    assert reader_of("org/of-this-test", "a", str(tmp_path))("no.json") is None
    assert reader_of("org/of-this-test", "a", str(tmp_path))("no.json") is None
    assert asked[2:] == ["no.json", "no.json"]
