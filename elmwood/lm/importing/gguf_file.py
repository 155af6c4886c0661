"""A GGUF file, llama.cpp's format, as a transformers folder."""

import copy
from pathlib import Path

from elmwood.lm.pretrained import open_gguf, open_gguf_tokenizer
from elmwood.registry import require


def convert(path: Path, folder: Path) -> tuple[str, ...]:
    """Write a GGUF file as a float32 transformers folder; say what was changed. Quantised weights are expanded, which is slow.

    Raises BadSeed, MissingExtra.
    """
    require("gguf", "gguf")
    model, tokenizer = open_gguf(path), open_gguf_tokenizer(path)
    # the model is still marked as quantised, so it can be neither saved nor trained (transformers 5.23): copy its weights to a new one
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = type(model)(config)
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ()
