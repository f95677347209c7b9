"""Ranks, metrics and significance. Knows neither models nor data sources."""
