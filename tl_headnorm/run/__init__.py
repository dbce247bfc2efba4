"""Run directories, run logs, processes, signals."""
