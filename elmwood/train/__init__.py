"""Training: seeds from scratch and experts, full or adapters, by one loop that resumes exactly. `train.fit` says before if it fits."""

from elmwood.train.adopt import import_adapter
from elmwood.train.moments import statistics
from elmwood.train.router import tune
from elmwood.train.tasks import train, train_key, train_seed
from elmwood.train.together import together_keys, train_together

__all__ = ["import_adapter", "statistics", "together_keys", "train", "train_key", "train_seed", "train_together", "tune"]
