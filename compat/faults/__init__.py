"""Faults, and what each costs with distpool and its peers: 8 tasks, the fourth bad, 2 workers, then one more task."""
