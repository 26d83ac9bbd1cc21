"""Everything a training loop needs besides the update step: saving, resuming, logs, signals, non-finite losses."""
