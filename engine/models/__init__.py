"""Model architectures: each file is the architecture and nothing else."""
