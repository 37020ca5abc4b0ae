"""What prefill and decode services share: engine and pool as one rank, codecs, membership, control, life cycle."""
