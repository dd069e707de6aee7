"""Prompts, and the Parquet schemas of what runs read and write."""
