"""Objective, optimizers, the FSDP2 and ZeRO engines, checkpoints and their lineage."""
