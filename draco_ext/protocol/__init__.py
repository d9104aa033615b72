"""How messages travel between ranks: communicators, transports and the scheduler of their exchanges.

Knows the codes below it and nothing of a training framework.
"""
