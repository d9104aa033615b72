"""Audit on data-parallel models: ranks recompute each other's parts and put right what is wrong within the step."""
