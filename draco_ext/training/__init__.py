"""Training with a code: `protect` for DistributedDataParallel, the sampler, and the parts of a training step.

It imports the protocol, the reports and the codes, and nothing of the command line.
"""
