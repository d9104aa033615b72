"""What a guard found: findings, the ledger, evidence over many decodes. Knows nothing of training or protocol."""
