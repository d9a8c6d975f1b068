"""`make gpu-check`: what the first half hour on a card can show, each part in a process of its own, into one folder."""
