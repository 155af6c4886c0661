"""What talks to a hub: the volunteer's loop, the verifier, and what brings a snapshot down. Torch only inside functions."""
