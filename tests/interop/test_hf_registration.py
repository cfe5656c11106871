"""transformers knows the models whichever of the two packages is imported first, and neither waits for the other."""

from __future__ import annotations

import subprocess
import sys

import pytest
import transformers.models.auto.configuration_auto  # noqa: F401

from terseformer.interop.hf import registration

LOADED = "{'torch', 'transformers', 'cattrs'} & set(sys.modules)"
KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
config = AutoConfig.for_model("terseformer")
for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    assert type(config) in auto._model_mapping, auto
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "TerseformerForCausalLM"
"""
GONE = "import sys; assert not [x for x in sys.meta_path if type(x).__module__.startswith('terseformer')]"


def run(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_nothing_is_imported_with_the_package() -> None:
    run(f"import sys, terseformer; assert not {LOADED}, {LOADED}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import terseformer; from transformers import PreTrainedModel",  # whose import loads the list in its midst
        "import transformers; from transformers import AutoConfig; import terseformer",
        "import transformers, terseformer",
    ],
)
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    run(f"{first}\n{KNOWN}\n{GONE}")


def test_a_version_that_is_too_old_is_told_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.warns(UserWarning, match=r"transformers 4\.57\.1 is too old .* install 5\.0 or newer"):
        registration.register()
