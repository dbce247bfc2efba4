"""`ablate`: heads or MLPs removed."""
