"""The workdir of a run: its settings, files and lock, and the environment it ran in."""
