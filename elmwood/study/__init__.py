"""What combines rooms and returns records: never prints, imports torch only inside functions."""
