"""Memories: one file each. See ``base`` for the slot that they fit."""
