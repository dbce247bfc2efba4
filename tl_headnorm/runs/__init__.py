"""What keeps a run whole: state, processes, signals, digests, rows on disk, and merging."""
