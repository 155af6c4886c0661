"""What a hub does, each one a function of a connection inside a write, the message, who sent it and the moment: no half is ever seen.

`request.py` guards them all: signature's nonce, blocked keys, idempotency. Nothing else writes a state.
"""
