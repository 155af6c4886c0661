"""Engines that continue many texts at once: what a server runs. `interface.py` says what all of them do; it is free of torch.

`turns.py` works for any LM: each text in turn is one token longer.
"""
