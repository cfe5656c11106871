"""Run by torchrun: models that are sharded unit by unit have the loss and the gradients of whole ones.

torchrun --nproc-per-node 2 tests/sharded.py NAME ...

The names are of variants; none takes all. Then the memory of a training is compared with what is computed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from terseformer.config import EncoderDecoderConfig, ModelConfig, TrainConfig
from terseformer.models import make_model
from terseformer.objectives import Loss
from terseformer.optim import make_optimizer
from terseformer.sharding import own_part, shard_rest, sharding_units, training_memory, whole
from variants import ENCODER_DECODERS, PYTORCH_ONLY, VARIANTS

CONFIGS: dict[str, ModelConfig | EncoderDecoderConfig] = {
    **{name: replace(config, dropout=0.1) for name, config in {**VARIANTS, **PYTORCH_ONLY, **ENCODER_DECODERS}.items()},
    "seq2seq-chunked": replace(ENCODER_DECODERS["seq2seq-scaling"], ff_chunk_size=2),
    "terraformer-chunked": replace(ENCODER_DECODERS["terraformer-scaling_reversible"], ff_chunk_size=2),
}


def new_loss(config: ModelConfig | EncoderDecoderConfig, mesh: DeviceMesh | None) -> Loss:
    """With the same weights each time."""
    torch.manual_seed(0)
    with sharding_units(mesh):
        loss = Loss(make_model(config)).train()
    if mesh is not None:
        shard_rest(loss, mesh)
    return loss


def compare(config: ModelConfig | EncoderDecoderConfig, mesh: DeviceMesh) -> None:
    """The gradients of two passes, summed, where each process has other tokens."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    source, target = (torch.randint(1, 21, (3, length), generator=draw) for length in (9, 7))
    part = (source, torch.tensor([9, 4, 7]), target, torch.tensor([6, 2, 4]))
    if isinstance(config, ModelConfig):
        part = (target,)
    plain, sharded = new_loss(config, None), new_loss(config, mesh)
    for step in range(2):
        values = []
        for loss in (plain, sharded):
            torch.manual_seed(10 * step + dist.get_rank())
            values.append(loss(*part))
            values[-1].backward()
        assert torch.equal(values[0], values[1]), values
    for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, whole(other)), name
        grad = torch.zeros_like(one) if one.grad is None else one.grad
        dist.all_reduce(grad)
        if other.grad is None:
            assert not grad.any(), name
        else:
            torch.testing.assert_close(whole(other.grad), grad / dist.get_world_size(), atol=1e-5, rtol=1e-5, msg=name)


def compare_memory(config: ModelConfig | EncoderDecoderConfig, mesh: DeviceMesh, optimizer: str) -> None:
    """What the first process holds between steps is what is computed; the others may hold less."""
    loss = new_loss(config, mesh)
    trained = make_optimizer(loss, TrainConfig(optimizer=optimizer))
    for parameter in loss.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trained.step()
    computed = training_memory(config, optimizer, "fsdp", mesh.size())
    parameters = list(loss.parameters())
    states = [s for state in trained.state.values() for s in state.values() if s is not None and s.dim() > 0]
    for name, tensors in (
        ("parameters", parameters),
        ("gradients", [p.grad for p in parameters]),
        ("optimizer", states),
    ):
        held = sum(own_part(tensor)[0].numel() * 4 for tensor in tensors)
        assert held == computed[name] or (dist.get_rank() > 0 and held < computed[name]), (name, held, computed)


def main() -> None:
    """Names are printed as they are done."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in sys.argv[1:] or CONFIGS:
        try:
            compare(CONFIGS[name], mesh)
        except Exception:
            print(f"{name} fails", file=sys.stderr, flush=True)
            raise
        if dist.get_rank() == 0:
            print(name, flush=True)
    for name, optimizer in (("whole-scaling", "adamw"), ("terraformer-scaling_reversible", "adafactor")):
        compare_memory(CONFIGS[name], mesh, optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # before Python shuts down under Gloo's threads: see cli/training.py
