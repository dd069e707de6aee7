"""Runs on a cluster: the only package here that imports ray, deepspeed and mlflow."""
