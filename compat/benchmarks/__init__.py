"""Benchmarks of distpool and its peers: workloads W1-W9 and scaling, in alternating fresh processes."""
