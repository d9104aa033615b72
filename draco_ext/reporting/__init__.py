"""The findings of a guard, the ledger, and evidence over many decodes. It does not import training or protocol."""
