"""LoRA by PEFT: on the linear layers of a sparse model, and on the factors that lie in its other layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import draw, pair
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

import terseformer
from terseformer.config import EncoderDecoderConfig, ModelConfig
from variants import DISTINCT, ENCODER_DECODERS

# PEFT asks for a name that transformers has changed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FACTORS = ["shared.modules_weight", "shared.features_weight", "feed_forward.up_weight", "feed_forward.down_weight"]
CASES: dict[str, tuple[ModelConfig | EncoderDecoderConfig, dict]] = {
    "dense": (DISTINCT["attention-dense"], {"target_modules": ["query", "value", "head"]}),
    "sparse, linear": (DISTINCT["whole-scaling_sru_rotary_rms"], {"target_modules": "all-linear"}),
    "sparse, factors": (DISTINCT["whole-scaling"], {"target_modules": [], "target_parameters": FACTORS}),
    "sparse seq2seq": (
        ENCODER_DECODERS["seq2seq-scaling"],
        {"target_modules": ["cross.projection.key", "cross.projection.value", "controller.up"]},
    ),
    "terraformer": (
        ENCODER_DECODERS["terraformer-scaling"],
        {"target_modules": ["controller.up"], "target_parameters": FACTORS[:2]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_learns_and_is_kept(name: str, tmp_path: Path) -> None:
    config, targets = CASES[name]
    own, model = pair(config, tmp_path / "base")
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    task = "CAUSAL_LM" if isinstance(config, ModelConfig) else "SEQ_2_SEQ_LM"
    adapted = get_peft_model(model, LoraConfig(task_type=task, r=4, lora_alpha=16, init_lora_weights=True, **targets))
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert 0 < sum(map(torch.numel, learning)) < sum(map(torch.numel, own.parameters()))
    tokens, labels = draw(config, 4, 8), draw(config, 4, 8, seed=1)

    def loss() -> Tensor:
        return adapted(input_ids=tokens, labels=tokens if isinstance(config, ModelConfig) else labels).loss

    with torch.no_grad():
        first = loss()
    optimizer = torch.optim.Adam(learning, 0.02)
    adapted.train()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        assert all(parameter.grad is not None for parameter in learning)
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        last = loss()
    assert last < 0.9 * first

    adapted.save_pretrained(tmp_path / "adapter")
    _, base = pair(config, tmp_path / "again")
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    inputs = {"input_ids": tokens} if isinstance(config, ModelConfig) else {"input_ids": tokens, "labels": labels}
    with torch.no_grad():
        logits = adapted(**inputs).logits
        assert_close(loaded(**inputs).logits, logits)
        with loaded.disable_adapter():
            assert_close(loaded(**inputs).logits, pair(config, tmp_path / "third")[1](**inputs).logits)

    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = terseformer.load(tmp_path / "merged")
    with torch.no_grad():
        if isinstance(config, ModelConfig):
            got = merged(tokens)
        else:
            target = torch.cat([torch.zeros(4, 1, dtype=torch.long), labels[:, :-1]], 1)
            got = merged(tokens, target, torch.full((4,), 8))
    assert_close(got, logits, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == before.keys()
