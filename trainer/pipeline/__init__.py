"""Algorithm 1 as a resumable graph of stages: what to run, in which order, and what is already there."""
