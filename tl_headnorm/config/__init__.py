"""The settings of every command: dataclasses that give flags, YAML keys, types and help."""
