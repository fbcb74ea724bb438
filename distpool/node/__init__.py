"""This process as a member of the group: tasks, members, output, threads (layer 3)."""
