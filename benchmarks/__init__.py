"""Costs, floors, measurements: what the runtime must move and compute, and what it takes on a given machine."""
