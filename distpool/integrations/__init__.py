"""Adapters that other libraries load by name (beside the layers: only users import them)."""
