"""Preparation of data sets: each script turns a public layout into tar shards with a manifest."""
