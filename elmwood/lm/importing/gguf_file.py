"""A GGUF file, llama.cpp's format, as a transformers folder."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from elmwood.errors import BadSeed
from elmwood.lm.importing.config import UNREADABLE
from elmwood.registry import require


def convert(path: Path, folder: Path) -> tuple[str, ...]:
    """Write a GGUF file as a float32 transformers folder; say what was changed. Quantised weights are expanded, which is slow.

    Raises BadSeed, MissingExtra.
    """
    require("gguf", "gguf")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except UNREADABLE as error:
        raise BadSeed(f"{path}: transformers {transformers.__version__} cannot read it ({error}): use the original checkpoint") from error
    # the model is still marked as quantised, so it can be neither saved nor trained (transformers 5.23): copy its weights to a new one
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = type(model)(config)
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ()
