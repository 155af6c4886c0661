"""The part of a star that computes: inner steps on one machine, and losses for the gates."""
