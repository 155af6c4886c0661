"""Training: seeds from scratch and experts, full or adapters, by one loop that resumes exactly. `train.fit` says before if it fits."""
