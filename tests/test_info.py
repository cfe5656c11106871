"""What `terse info` prints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runs import DENSE
from terseformer import info
from terseformer.accounting import account
from terseformer.config import ConfigError, LowRankProjectionConfig
from terseformer.errors import UserError
from terseformer.presets import PRESETS, dense_twin


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # as where there is no terminal


def test_presets(capsys):
    info.show("")
    out = capsys.readouterr().out
    for name, config in PRESETS.items():
        [row] = [line for line in out.splitlines() if f"│ {name} " in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        costs = account(config)
        assert cells[1:] == [
            info.short(costs.parameters),
            info.short(costs.total.parameters_read),
            f"{costs.total.parameters_read / costs.parameters:.1%}",
            info.short(costs.flops_per_token),
        ]


def test_short():
    assert [info.short(n) for n in (0, 5_000, 187_648, 999_994_999, 13_726_384_128)] == [
        *("0.00 M", "0.01 M", "0.19 M", "999.99 M", "13.73 G")
    ]


@pytest.mark.parametrize("name", ["tiny", "small-1m-ff-qkv-loss", "scaling-17b-ff-qkv"])
@pytest.mark.parametrize("context", [0, 100])
def test_preset(name, context, capsys):
    info.show(name, context)
    out = capsys.readouterr().out
    costs, twin = account(PRESETS[name], context), account(dense_twin(PRESETS[name]), context)
    assert out.lstrip().startswith(name)
    assert f"│ {costs.parameters:,} │".replace(" ", "") in out.replace(" ", "")
    assert all(part.name in out for part in costs.parts)
    assert f"a token: {costs.flops_per_token:,} FLOPs, {costs.bytes_per_token(4) / 1e6:,.2f} MB" in out
    assert f"the dense twin, {twin.parameters:,} parameters: {twin.flops_per_token:,} FLOPs" in out
    assert "…" not in out


def test_machine(capsys):
    info.show("tiny")
    *_, packages, machine = capsys.readouterr().out.splitlines()
    assert all(f"{name} " in packages for name in ("terseformer", "torch", "accelerate", "Python"))
    assert all(word in machine for word in ("physical cores", "threads of PyTorch", "instruction set"))


def test_model_without_a_twin(capsys, monkeypatch):
    odd = replace(DENSE, hidden_size=64, attention=LowRankProjectionConfig(rank=1))
    monkeypatch.setitem(PRESETS, "odd", odd)
    with pytest.raises(ConfigError):
        dense_twin(odd)
    info.show("odd")
    assert "there is no dense twin within 1 % of its parameters" in capsys.readouterr().out


def test_unknown_instruction_set(monkeypatch):
    def isa() -> str:
        raise ValueError("TERSE_ISA = z80 is unknown")

    monkeypatch.setattr(info.native, "isa", isa)
    with pytest.raises(UserError, match="z80"):
        info.show("tiny")
