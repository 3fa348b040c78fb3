"""What is known without running: costs and floors, counted bytes, kernels compiled ahead of time."""
