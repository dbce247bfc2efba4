"""Figures, from arrays and tables to plotly and PNG. No torch."""
