"""Training across processes: `protect` for DistributedDataParallel, the sampler, the parameter-server rounds.

Knows the codes below it and nothing of the command line above it.
"""
