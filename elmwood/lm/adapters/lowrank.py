"""A mixture whose experts are low-rank changes of one shared feed-forward (the idea of FlexMoRE, arXiv:2602.08818), per-token gates.

The wide products are computed once for all experts: gate_proj and up_proj of the seed before the experts differ, down_proj of the seed
after their outputs have been summed. So another expert costs only its factors, and hundreds fit in the memory of one more feed-forward.

T tokens, C of them that chose an expert, K experts per token, E experts, R rank (the largest; others have zeros), H width,
I width of the feed-forward
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from elmwood.errors import BadSeed
from elmwood.store.headers import read_header

FILE = "mixture.json"
PARTS = ("gate_proj", "up_proj", "down_proj")


class Gate(nn.Module):
    """As the routers of transformers: logits [T, E], weights [T, K] that sum to one, numbers [T, K]."""

    def __init__(self, experts: int, width: int, top_k: int):
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.zeros(experts, width)), top_k

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logit_TE = functional.linear(x_TH, self.weight)
        top_TK, number_TK = torch.topk(logit_TE.float(), self.top_k, dim=-1)
        return logit_TE, torch.softmax(top_TK, -1).to(x_TH.dtype), number_TK


class Gated(nn.Module):
    """A seed's feed-forward with gated low-rank experts over it."""

    def __init__(self, base: Any, experts: int, ranks: dict[str, int], top_k: int):
        super().__init__()
        self.base = base
        self.gate = Gate(experts, base.gate_proj.in_features, top_k)
        for part, rank in ranks.items():
            linear = getattr(base, part)
            self.register_buffer(f"{part}_A", torch.zeros(experts, rank, linear.in_features), persistent=False)
            self.register_buffer(f"{part}_B", torch.zeros(experts, linear.out_features, rank), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.flatten(0, -2)
        _, weight_TK, number_TK = self.gate(x_TH)
        gate_TI, up_TI = self.base.gate_proj(x_TH), self.base.up_proj(x_TH)
        summed_TI, low_TH = torch.zeros_like(gate_TI), torch.zeros_like(x_TH)
        for e, token_C, weight_C1 in _chosen(number_TK, weight_TK):
            x_CH = x_TH[token_C]
            gate_CI = gate_TI[token_C] + self._low("gate_proj", e, x_CH)
            mine_CI = self.base.act_fn(gate_CI) * (up_TI[token_C] + self._low("up_proj", e, x_CH)) * weight_C1
            summed_TI = summed_TI.index_add(0, token_C, mine_CI.to(summed_TI.dtype))  # autocast narrows some of them
            low_TH = low_TH.index_add(0, token_C, self._low("down_proj", e, mine_CI).to(low_TH.dtype))
        return (self.base.down_proj(summed_TI) + low_TH).view(x.shape)

    def _low(self, part: str, e: int, x_CX: Tensor) -> Tensor:
        return x_CX @ getattr(self, f"{part}_A")[e].t() @ getattr(self, f"{part}_B")[e].t()


def _chosen(number_TK: Tensor, weight_TK: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that some token chose: its number, these tokens, their weights [C, 1]."""
    for e in number_TK.unique().tolist():
        token_C, place_C = torch.where(number_TK == e)
        yield e, token_C, weight_TK[token_C, place_C, None]


def add_gated_experts(model: Any, folder: Path) -> Any:
    """Add the experts and gates in `folder` to a seed, in place. Raises BadSeed."""
    settings = json.loads((folder / FILE).read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("mixture-*.safetensors")):
        read_header(path)
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    layers = [name.removesuffix(".gate.weight") for name in tensors if name.endswith(".mlp.gate.weight")]
    parts = {part: max((t.shape[0] for name, t in tensors.items() if name.endswith(f"{part}.lora_A")), default=1) for part in PARTS}
    for layer in layers:
        base = model.get_submodule(layer)
        if any(not isinstance(getattr(base, part, None), nn.Linear) for part in PARTS):
            raise BadSeed(f"{layer} has no gate_proj, up_proj and down_proj: this seed cannot hold a low-rank mixture; choose another seed")
        block = Gated(base, settings["experts"], parts, settings["top_k"]).to(base.gate_proj.weight.device, base.gate_proj.weight.dtype)
        model.set_submodule(layer, block)
    with torch.no_grad():
        for name, value in tensors.items():
            _place(model, name, value).copy_(value)
    return model


def _place(model: Any, name: str, value: Tensor) -> Tensor:
    """The parameter of a file's tensor; for an expert its part of a stack, up to its rank."""
    layer, experts, rest = name.partition(".experts.")
    if not experts:
        return model.get_parameter(name)
    e, part, half = rest.split(".")
    stack = getattr(model.get_submodule(layer), f"{part}_{half[-1]}")[int(e)]
    return stack[: value.shape[0], : value.shape[1]]
