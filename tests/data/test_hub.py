from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from terseformer.config import ConfigError, DataConfig
from terseformer.data import DataError, read_documents
from terseformer.data.hub import HubSource


def read(source: str, **settings) -> list[str]:
    config = DataConfig(sources=(source,), **settings)
    return [document.text for document in read_documents(config, Path("no cache is used"))]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:wikitext", ("wikitext", None, "train", None)),
        ("hf:ccdv/arxiv-summarization", ("ccdv/arxiv-summarization", None, "train", None)),
        ("hf:ccdv/arxiv-summarization:test", ("ccdv/arxiv-summarization", None, "test", None)),
        ("hf:allenai/c4/en:train[:100]", ("allenai/c4", "en", "train", 100)),
        ("hf:Salesforce/wikitext/wikitext-2-raw-v1", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None)),
    ],
)
def test_spelling(source, parts):
    parsed = HubSource.parse(source)
    assert (parsed.name, parsed.config, parsed.split, parsed.rows) == parts


@pytest.mark.parametrize("source", ["hf:", "hf:a/b/c/d", "hf:a:b:c", "hf:a/b:train[5:9]", "hf:a/b:", "hf:/a", "hf:a b"])
def test_bad_spelling(source):
    with pytest.raises(ConfigError, match=r"must be spelled hf:OWNER/NAME\[/CONFIG\]\[:SPLIT\]"):
        read(source)


@pytest.fixture
def data_set(tmp_path, monkeypatch) -> str:
    """A data set in ./owner/name: `datasets` takes a folder of that name before it asks the hub."""
    pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, count in (("train", 5), ("test", 2)):
        rows = ({"page": i // 2, "body": f"{split} {i}"} for i in range(count))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return "hf:owner/name"


def test_rows_are_documents(data_set):
    assert read(data_set, text_field="body") == [f"train {i}" for i in range(5)]
    assert read(data_set + ":test", text_field="body") == ["test 0", "test 1"]
    assert read(data_set + ":train[:3]", text_field="body") == ["train 0", "train 1", "train 2"]
    assert read(data_set, text_field="body", document_fields=("page",)) == [
        "train 0\ntrain 1",
        "train 2\ntrain 3",
        "train 4",
    ]


def test_errors_of_a_data_set(data_set):
    with pytest.raises(DataError, match=r"hf:owner/name row 1 has no field 'text', only 'page', 'body'"):
        read(data_set)
    with pytest.raises(DataError, match=r"hf:owner/name:dev cannot be read: Bad split: dev\. Available splits"):
        read(data_set + ":dev")
    with pytest.raises(DataError, match=r"hf:owner/name/odd cannot be read: .*odd.*check the names"):
        read(data_set + "/odd")


def test_offline(data_set, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf:owner/absent cannot be read: .*and the network"):
        read("hf:owner/absent")


def test_datasets_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="an hf: source needs the package datasets; run pip install datasets"):
        read("hf:owner/name")
