"""Benchmarks, metrics, methods to compare, and what comes of them: `evaluate.evaluate`, or `madiff evaluate`."""
