"""Training with a code: `protect` for DistributedDataParallel, the sampler, and what a step of training needs.

Knows the protocol, the reports and the codes below it, and nothing of the command line above it.
"""
