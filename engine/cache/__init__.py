"""Block accounting: the pool, the prefix cache and the seam for blocks from elsewhere. No torch."""
