"""What a run is on disk: its settings, the files in its workdir, the lock, the machine it ran on."""
