"""Ranks: who they are (env), how they start (launch, process_group), how they talk
(collectives)."""
