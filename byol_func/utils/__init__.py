"""One namesake per file of the official `byol/utils`, so that two windows line up."""
