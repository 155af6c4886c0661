"""The trunk of a model: the layers below the first one that adapters change. What it makes of a text is the seed's, whoever reads it.

B rows of a batch, T tokens, H width
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# (number of a layer, hidden states that it is given, its other arguments) -> the same, as it shall have them
Enter = Callable[[int, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def stack_of(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The layers of a transformers model, in their order, and the name of the list; none where it has no list of them."""
    count = model.config.get_text_config().num_hidden_layers
    found = ((name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == count)
    return next(found, None)


def trunk_depth(model: Any, names: Collection[str]) -> int:
    """How many layers stand below the first one with any of these modules; 0 where one of them is outside the layers."""
    stack = stack_of(model)
    if stack is None or not names or any(not name.startswith(f"{stack[0]}.") for name in names):
        return 0
    return min(int(name[len(stack[0]) + 1 :].split(".")[0]) for name in names)


class Gate:
    """Lets `enter` see, and change, what each layer of a model is given, until it is removed. None: nothing is changed."""

    def __init__(self, model: Any):
        stack = stack_of(model)
        assert stack
        self.enter: Enter | None = None
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._given, number), with_kwargs=True) for number, layer in enumerate(stack[1])
        ]

    def _given(self, number: int, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self.enter is None:
            return None
        if not args:
            hidden, named = self.enter(number, named["hidden_states"], named)
            return (), named | {"hidden_states": hidden}
        hidden, named = self.enter(number, args[0], named)
        return (hidden, *args[1:]), named

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Fork:
    """A model whose layers below `depth` read one row for several experts, or once for one expert after another."""

    def __init__(self, model: Any, depth: int):
        stack = stack_of(model)
        assert stack
        self.model, self.depth, self.layers, self.gate = model, depth, list(stack[1]), Gate(model)

    @contextmanager
    def fan(self, rows: int) -> Iterator[None]:
        """Let a batch of one row be one of so many rows from the first layer with adapters on."""

        def enter(number: int, hidden_BTH: Tensor, named: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            return (hidden_BTH.expand(rows, -1, -1) if number == self.depth else hidden_BTH), named

        self.gate.enter = enter
        try:
            yield
        finally:
            self.gate.enter = None

    def read(self, tokens_BT: Tensor) -> Tensor:
        """What comes out of the trunk [B, T, H]."""
        found = []

        def catch(hidden_BTH: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(hidden_BTH)
            return hidden_BTH

        with instead(self.layers[self.depth : self.depth + 1], catch), instead(self.layers[self.depth + 1 :], _same):
            self.model.base_model(input_ids=tokens_BT, use_cache=False)
        return found[0]

    @contextmanager
    def after(self, hidden_BTH: Tensor) -> Iterator[None]:
        """Let the trunk, which has read these tokens before, give this."""
        with instead(self.layers[: self.depth], lambda *_, **__: hidden_BTH):
            yield


def _same(hidden_BTH: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_BTH


@contextmanager
def instead(layers: Iterable[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let a function stand in the place of these layers."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer, _ in before:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in before:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


@torch.inference_mode()
def open_fork(model: Any, names: Collection[str]) -> Fork | None:
    """Share the trunk of a model with adapters in these modules, none of which is in use; None where there is none, or where the model
    does not read so as it does otherwise. It is tried."""
    depth = trunk_depth(model, names)
    if not depth:
        return None
    tokens_2T = (31 * torch.arange(1, 17, device=model.device) % model.config.get_text_config().vocab_size).view(2, 8)
    fork = Fork(model, depth)
    rounding = (64 if model.dtype == torch.float32 else 4) * torch.finfo(model.dtype).eps
    try:
        whole_2TV = model(input_ids=tokens_2T, use_cache=False).logits.float()
        with fork.fan(2):
            fanned_2TV = model(input_ids=tokens_2T[:1], use_cache=False).logits.float()
        with fork.after(fork.read(tokens_2T)):
            after_2TV = model(input_ids=tokens_2T, use_cache=False).logits.float()
        pairs = ((whole_2TV[:1].expand(2, -1, -1), fanned_2TV), (whole_2TV, after_2TV))
        near = max(1e-4, rounding * float(whole_2TV.abs().max()))
        if all(one.shape == other.shape and float((one - other).abs().max()) <= near for one, other in pairs):
            return fork
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError):  # its layers are given something else
        pass
    fork.gate.remove()
    return None
