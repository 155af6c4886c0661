"""The trunk of a model: the layers below the first one that adapters change. What it makes of a text is the seed's, whoever reads it."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn

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
