"""Benchmarks of `experiments.bench`: workloads, timing, arithmetic floors, baselines, reports.

Nothing is offered here: `experiments.bench_gpu` needs no models, so it imports `timing` alone.
"""
