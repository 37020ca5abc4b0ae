"""A complete inference engine: model, paged KV cache, scheduler, sampler. One thread touches it; no network."""
