"""llama.cpp itself, as the wheel of xllamacpp has it: what it makes of a GGUF file.

T tokens, V vocabulary
"""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server, ggml_type, llama_flash_attn_type


class Llama:
    """A GGUF file opened by llama.cpp, with a cache in float32. Raises RuntimeError where it does not load."""

    def __init__(self, path: Path, lora: Path | None = None, context: int = 64):
        asked = CommonParams()
        asked.model.path, asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = str(path), context, 1, 0
        asked.cache_type_k = asked.cache_type_v = ggml_type.GGML_TYPE_F32
        asked.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
        asked.warmup, asked.verbosity, asked.fit_params, asked.swa_full = False, 0, False, True
        if lora:
            asked.lora_adapters = [CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = Server(asked)

    def tokenize(self, text: str, special: bool = False, begins: bool = False) -> list[int]:
        """`special`: the text of a special token is that token; `begins`: with what the file says a text begins with."""
        asked = {"content": text, "parse_special": special, "add_special": begins}
        there = Request(f"{self.server.listening_address}/tokenize", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urlopen(there, timeout=30) as answer:
            return json.load(answer)["tokens"]

    def log_probs(self, tokens: Sequence[int], vocabulary: int, every: int = 8, plain: int = 65) -> torch.Tensor:
        """[T, V] of the token after each of these, for the last of them and others at this distance; NaN between.

        `plain`: an id that is whole text, since a part of a character and an end of text come with no probabilities.
        """
        found_TV = torch.full((len(tokens), vocabulary), torch.nan)
        for t in range((len(tokens) - 1) % every, len(tokens), every):
            asked = {"prompt": list(tokens[: t + 1]), "n_predict": 1, "n_probs": vocabulary, "logit_bias": [[plain, 1e4]], "temperature": 0}
            said = self.server.handle_completions(asked)
            assert said["usage"]["prompt_tokens"] == t + 1
            for one in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                found_TV[t, one["id"]] = one["logprob"]
        return found_TV

    def differs(self, tokens: Sequence[int], logits_TV: torch.Tensor) -> float:
        """The largest difference of a log-probability from those of these logits."""
        found_TV = self.log_probs(tokens, logits_TV.shape[1])
        return float((found_TV - logits_TV.log_softmax(-1))[~found_TV.isnan().any(1)].abs().max())
