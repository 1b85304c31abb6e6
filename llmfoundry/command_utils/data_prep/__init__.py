"""Converters from text to MDS shards: ``engine`` does the work, ``convert_*`` are the commands."""
