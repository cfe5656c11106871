"""What docs/huggingface.md shows, done with the folder of a run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import terseformer

TEXT = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
FOLDER = "runs/small-1m/step-00001000"
TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{passage}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""

# PEFT asks for a name that transformers has changed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("python"))
    assert code.count(FOLDER) == 2
    exec(code.replace(FOLDER, str(folder)).replace("max_new_tokens=40", "max_new_tokens=4"), {})
    assert terseformer.load(tmp_path / "runs" / "changed").config == terseformer.load(folder).config


@pytest.mark.slow
def test_shell(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"passage": "ab cd"}) + "\n")
    task = TASK.format(file=tmp_path / "rows.jsonl", cache=tmp_path / "cache")
    (tmp_path / "local.yaml").write_text(task)
    (command,) = blocks("sh")
    program, *rest = shlex.split(command.replace(FOLDER, str(folder)).replace("lambada_openai", "local"))
    assert program == "python"
    more = ["--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out")]
    subprocess.run([sys.executable, *rest, *more], check=True)
    (scores,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(scores.read_text())["results"]["local"]["bits_per_byte,none"] > 0
