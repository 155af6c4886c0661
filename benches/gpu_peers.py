"""Tokens per second of other trainers, one in a process of its own: what some of them change in transformers stays there.

    python -m benches.gpu_peers trl [--device cuda] [--small] [--config FILE]

trainer    transformers' Trainer over PEFT's modules: bf16, fused AdamW
liger      the same with liger-kernel's kernels
compiled   the same without them, through torch.compile
trl        TRL's SFTTrainer as its docs say it is fast: liger-kernel and FlashAttention where they are installed, no recomputation
unsloth    Unsloth's model in TRL's SFTTrainer, fused, no recomputation

All train the model of --config (a transformers config as JSON, a tiny Llama by default) in full and by LoRA of rank 16 on all linear
layers, on rows that hold one document, so there is nothing to pack or pad; of two sizes of batch the larger one that fits. A JSON line
for each, or one that says why there is none. It imports nothing of elmwood, so the Python of another environment may run it
(`python -m benches.gpu --peers PYTHON`): pip install trl==1.16.0 liger-kernel; unsloth==2026.10.9, which takes transformers up to 5.17.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TINY = {"model_type": "llama", "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 128, "max_position_embeddings": 128}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, KEPT = 16, 1 << 19  # tokens of text, again and again
NEEDS = {"liger": ("liger_kernel",), "trl": ("trl", "datasets"), "unsloth": ("unsloth", "trl", "datasets")}
CARD = ("liger", "compiled", "unsloth")  # what runs, or pays, on a GPU only


def say(**facts: Any) -> None:
    print(json.dumps({"bench": "gpu", "measured": "peer", **facts}), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("peer", choices=PEERS)
    options.add_argument("--device", default="cuda")
    options.add_argument("--small", action="store_true", help="two rows of 32 tokens, one step after the first: that it runs")
    options.add_argument("--config", type=Path, help="of the model")
    asked = options.parse_args()
    card = asked.device.startswith("cuda")
    if missing := [name for name in NEEDS.get(asked.peer, ()) if not importlib.util.find_spec(name)]:
        return say(peer=asked.peer, skipped=f"{missing[0].replace('_', '-')} is not installed")
    if asked.peer in CARD and not card:
        return say(peer=asked.peer, skipped=f"{asked.peer} is measured on CUDA alone, and --device is {asked.device}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}  # nothing here is fetched, or told to anybody
    if asked.peer == "unsloth":
        importlib.import_module("unsloth")  # before what it changes
    config = json.loads(asked.config.read_text()) if asked.config else TINY
    for method in ("full", "lora"):
        for batch in (2,) if asked.small else (32, 16):
            try:
                measure(asked.peer, method, config, batch, card, asked.small)
                break
            except Exception as error:  # a line like others; a smaller batch where memory ran out
                if type(error).__name__ != "OutOfMemoryError":
                    if asked.small:
                        raise
                    say(peer=asked.peer, method=method, batch=batch, error=f"{type(error).__name__}: {str(error)[:400]}")
                    break
                say(peer=asked.peer, method=method, batch=batch, error="memory ran out")


def measure(peer: str, method: str, config: dict[str, Any], batch: int, card: bool, small: bool) -> None:
    """Train a few steps, and say how fast the later ones were."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    length, (warm, steps) = 32 if small else 2048, (1, 1) if small else (4, 6)
    count = max(batch, min(KEPT // length, batch * (warm + steps)))
    rows = np.random.default_rng(0).integers(1, config["vocab_size"] - 2, (count, length)).tolist()
    if card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": batch, "max_steps": warm + steps, "bf16": card, "use_cpu": not card,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1000, "disable_tqdm": True, "optim": "adamw_torch_fused",
        }  # fmt: skip
        marks: list[float] = []
        trainer = PEERS[peer](peer, method, config, rows, settings, card, folder)
        trainer.add_callback(clock((warm, warm + steps), marks, card))
        trainer.log = lambda *_, **__: None  # it would print
        trainer.train()
    facts: dict[str, Any] = {"tokens/s": round(steps * batch * length / (marks[1] - marks[0]), 1)}
    if card:
        facts["reserved MB"] = round(torch.cuda.max_memory_reserved() / 1e6)
    libraries = {name: version(name) for name in ("transformers", *(NEEDS.get(peer, ())[:1]))}
    say(peer=peer, method=method, batch=batch, length=length, attention=attention(card), **facts, **libraries)


def clock(at: tuple[int, ...], marks: list[float], card: bool) -> Any:
    """Notes the time at the end of these steps."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step in at:
                if card:
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

    return Clock()


def attention(card: bool) -> str:
    return "flash_attention_2" if card and importlib.util.find_spec("flash_attn") else "sdpa"


def new_model(config: dict[str, Any], method: str, card: bool) -> Any:
    """Random weights; in bf16 where they are frozen, on a card."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    with torch.device("cuda" if card else "cpu"):
        return AutoModelForCausalLM.from_config(
            made, dtype=torch.bfloat16 if card and method == "lora" else torch.float32, attn_implementation=attention(card)
        )


def adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def transformers_trainer(
    peer: str, method: str, config: dict[str, Any], rows: Sequence[Any], settings: dict[str, Any], card: bool, _: str
) -> Any:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = new_model(config, method, card)
    if method == "lora":
        model = get_peft_model(model, adapters())
    settings |= {"use_liger_kernel": peer == "liger", "torch_compile": peer == "compiled"}
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def words(vocabulary: int) -> Any:
    """A tokenizer for text that is tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": vocabulary - 1}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")


def trl_trainer(_: str, method: str, config: dict[str, Any], rows: Sequence[Any], settings: dict[str, Any], card: bool, __: str) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    liger = card and importlib.util.find_spec("liger_kernel") is not None
    made = SFTConfig(**settings, max_length=len(rows[0]), gradient_checkpointing=False, use_liger_kernel=liger)
    return SFTTrainer(
        model=new_model(config, method, card), args=made, train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=words(config["vocab_size"]), peft_config=adapters() if method == "lora" else None,
    )  # fmt: skip


def unsloth_trainer(
    _: str, method: str, config: dict[str, Any], rows: Sequence[Any], settings: dict[str, Any], card: bool, folder: str
) -> Any:
    """It opens models from a folder."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    new_model(config, method, False).save_pretrained(f"{folder}/model")
    words(config["vocab_size"]).save_pretrained(f"{folder}/model")
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=f"{folder}/model", max_seq_length=len(rows[0]), dtype=torch.bfloat16 if method == "lora" else None, load_in_4bit=False,
        full_finetuning=method == "full", use_gradient_checkpointing=False,
    )  # fmt: skip
    if method == "lora":
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", target_modules=LINEAR, use_gradient_checkpointing=False
        )
    return SFTTrainer(
        model=model, args=SFTConfig(**settings, max_length=len(rows[0]), gradient_checkpointing=False),
        train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer,
    )  # fmt: skip


PEERS: dict[str, Callable[..., Any]] = {
    "trainer": transformers_trainer, "liger": transformers_trainer, "compiled": transformers_trainer, "trl": trl_trainer,
    "unsloth": unsloth_trainer,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
