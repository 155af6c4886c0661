"""Training: seeds from scratch and experts, full or LoRA, by one loop that resumes exactly. `elmwood.train.fit` predicts what it takes."""

from elmwood.train.tasks import train, train_key, train_seed

__all__ = ["train", "train_key", "train_seed"]
