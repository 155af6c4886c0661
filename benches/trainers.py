"""What training is held against: transformers' Trainer over PEFT's modules, and TRL's SFTTrainer, fed as they are by default.

S steps, B rows of a batch, L tokens of a row
"""

import tempfile
import time
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from elmwood.corpus.tokens import Packed
from elmwood.lm.devices import best_device
from elmwood.lm.load import new_model
from elmwood.records import Recipe, Shape
from elmwood.train import loop
from elmwood.train.adapter import add_adapter
from elmwood.train.data import UNSCORED, batches

WARM = 5  # steps not counted
Times = tuple[float, float]  # wall and CPU seconds of one token


class Clock:
    """Wall and CPU time from the end of step WARM to the end of the last one."""

    def __init__(self, steps: int):
        self.steps, self.done, self.marks = steps, 0, []

    def tick(self) -> None:
        self.done += 1
        if self.done in (min(WARM, self.steps - 1), self.steps):
            self.marks.append((time.perf_counter(), time.process_time()))

    def per_token(self, tokens_of_a_step: float) -> Times:
        (wall, cpu), (wall_end, cpu_end) = self.marks
        tokens = (self.steps - min(WARM, self.steps - 1)) * tokens_of_a_step
        return (wall_end - wall) / tokens, (cpu_end - cpu) / tokens


class Rows(Dataset):
    def __init__(self, rows: list[dict[str, torch.Tensor]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return self.rows[place]


class Ticks(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_end(self, *_, **__) -> None:
        self.clock.tick()


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe in the Trainer's arguments; everything else stays at its default."""
    cpu = best_device().type == "cpu"
    return {
        "per_device_train_batch_size": recipe.batch, "max_steps": recipe.steps, "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.clip,
        "adam_beta2": recipe.beta2, "report_to": "none", "save_strategy": "no", "logging_steps": max(1, recipe.steps // loop.POINTS),
        "disable_tqdm": True, "use_cpu": cpu, "bf16": not cpu, "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip


def plain(model: Any) -> Any:
    """PEFT's own modules, without the forward pass that elmwood gives them."""
    for module in model.modules():
        module.__class__ = getattr(module, "plain", type(module))
    return model


def trainers(rows: Rows, tokens_of_a_step: float, recipe: Recipe, shape: Shape) -> Times:
    """transformers' Trainer, its defaults but for what the recipe says, over PEFT's own modules."""
    model, clock = new_model(shape).to(best_device()), Clock(recipe.steps)
    if recipe.method == "lora":
        model = plain(add_adapter(model, recipe, "bench"))
    with tempfile.TemporaryDirectory() as folder, loop.use_threads(recipe.threads):
        settings = TrainingArguments(output_dir=folder, **settings_of(recipe))
        trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[Ticks(clock)])
        trainer.log = lambda *_, **__: None  # it would print
        trainer.train()
    return clock.per_token(tokens_of_a_step)


def packers(packed: Packed, words: Tokenizer, recipe: Recipe, shape: Shape) -> Times:
    """TRL's SFTTrainer over whole documents, which it packs itself (`packing=True`); times of one token of its full rows."""
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    model, clock = new_model(shape).to(best_device()), Clock(recipe.steps)
    if recipe.method == "lora":
        model = plain(add_adapter(model, recipe, "bench"))
    ends = np.append(packed.starts[1:], len(packed.tokens))
    documents = [packed.tokens[first:end].tolist() for first, end in zip(packed.starts, ends, strict=True)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    with tempfile.TemporaryDirectory() as folder, loop.use_threads(recipe.threads):
        # its default strategy; the options that it would choose by itself where a GPU is, spelled out
        settings = SFTConfig(output_dir=folder, packing=True, max_length=recipe.length, gradient_checkpointing=False, **settings_of(recipe))
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Table.from_dict({"input_ids": documents}), processing_class=tokenizer,
            callbacks=[Ticks(clock)],
        )  # fmt: skip
        trainer.log = lambda *_, **__: None
        sizes = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    return clock.per_token(recipe.batch * sum(sizes) / len(sizes))


def blocks(packed: Packed, recipe: Recipe) -> Rows:
    """The same rows as ours, as a Trainer takes packed text: labels equal inputs, documents see one another."""
    tokens = [batch.tokens_BL for batch, _ in zip(batches(packed, recipe), range(recipe.steps))]  # noqa: B905  # one has no end
    return Rows([{"input_ids": row} for batch in tokens for row in torch.from_numpy(batch)])


def padded(packed: Packed, recipe: Recipe) -> tuple[Rows, float, float]:
    """One document per row, cut at `length`; the tokens of a step, and how much of what is computed they are (see `collate`)."""
    ends = np.append(packed.starts[1:], len(packed.tokens))
    order = np.random.default_rng(0).permutation(len(ends))[np.arange(recipe.steps * recipe.batch) % len(ends)]
    rows = [torch.from_numpy(packed.tokens[packed.starts[one] : ends[one]][: recipe.length].astype(np.int64)) for one in order]
    size_SB = np.array([len(row) for row in rows]).reshape(recipe.steps, recipe.batch)
    share = size_SB.sum() / (size_SB.max(1) * recipe.batch).sum()
    return Rows([{"input_ids": row} for row in rows]), size_SB.sum() / recipe.steps, share


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch, as transformers' own collators do; rows of one length stay as they are."""
    rows_L = [row["input_ids"] for row in rows]
    tokens_BL = pad_sequence(rows_L, batch_first=True)
    inside_BL = torch.arange(tokens_BL.shape[1]) < torch.tensor([len(row) for row in rows_L])[:, None]
    inputs = {"input_ids": tokens_BL, "labels": torch.where(inside_BL, tokens_BL, UNSCORED)}
    return inputs if inside_BL.all() else inputs | {"attention_mask": inside_BL.long()}
