"""Held-out loss and the accuracy of generated answers."""
