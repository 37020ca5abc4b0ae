"""What prefill and decode services share: the engine and its pool as one rank, codecs, membership, control, life cycle."""
