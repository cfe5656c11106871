"""Fully sharded data parallelism (FSDP2): two real processes learn what plain ones do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from terseformer import config as c
from terseformer.models import make_model
from terseformer.objectives import Loss

dist.init_process_group("gloo")
config = c.TerraformerConfig(
    vocab_size=40, hidden_size=16, num_attention_heads=2, num_encoder_layers=2, num_decoder_layers=2,
    max_position_embeddings=32, dropout=0.1,
    feed_forward=c.SparseFeedForwardConfig(intermediate_size=32, ff_block_size=4, controller_rank=4, quant_prob=0.5),
)

def new_loss():
    torch.manual_seed(0)
    return Loss(make_model(config)).train()

plain, sharded = new_loss(), new_loss()
mesh = init_device_mesh("cpu", (2,))
if "layers" in sys.argv:
    for layer in sharded.model.decoder.layers:
        fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
draw = torch.Generator().manual_seed(dist.get_rank())
source, target = (torch.randint(1, 40, (3, length), generator=draw) for length in (9, 6))
part = source, torch.tensor([9, 4, 7]), target, torch.tensor([5, 2, 4])
losses = []
for loss in (plain, sharded):
    torch.manual_seed(5)
    losses.append(loss(*part))
    losses[-1].backward()
assert torch.equal(losses[0], losses[1])
for one, other in zip(plain.parameters(), sharded.parameters(), strict=True):
    dist.all_reduce(one.grad)
    torch.testing.assert_close(other.grad.full_tensor(), one.grad / 2, atol=1e-6, rtol=1e-6)
print("the same gradients")
dist.destroy_process_group()
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*torchrun, str(tmp_path / "program.py"), *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.slow
def test_a_sharded_reversible_model_has_the_gradients_of_a_whole_one(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same gradients") == 2


@pytest.mark.slow
def test_layers_of_a_reversible_stack_are_not_sharded_one_by_one(tmp_path: Path) -> None:
    done = run(tmp_path, "layers")
    assert done.returncode != 0
    assert "call fully_shard on the whole model" in done.stderr
