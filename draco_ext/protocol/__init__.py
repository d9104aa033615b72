"""The exchange of messages between ranks: communicators, transports and the scheduler of their exchanges.

It imports the codes, and nothing of a training framework.
"""
