"""Runs as data: read from their folders, collected, and put into rows."""
