"""Conversion and generation commands, one per file."""
