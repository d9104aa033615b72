"""Audit on DistributedDataParallel: ranks recompute each other's parts and put right what is wrong within the step."""
