"""PEFT without bitsandbytes. PEFT imports it wherever it is installed, which takes longer than PEFT itself, and only models in four bits
need it: they have imported it before."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """PEFT takes bitsandbytes to be absent here, unless it was imported before."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # to import it fails
    try:
        _ask_again()
        yield
    finally:
        del sys.modules["bitsandbytes"]
        _ask_again()


def _ask_again() -> None:
    """PEFT remembers whether it is there."""
    if "peft" in sys.modules:
        from peft import import_utils

        import_utils.is_bnb_available.cache_clear()
        import_utils.is_bnb_4bit_available.cache_clear()


with without_bitsandbytes():
    import peft
    from peft import LoraConfig as LoraConfig
    from peft import get_peft_model_state_dict as get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer as LoraLayer
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert_peft_config_for_transformers

get_peft_model = without_bitsandbytes()(peft.get_peft_model)
read_adapter = without_bitsandbytes()(peft.PeftModel.from_pretrained)
