"""``modelslim_v0``: old recipes, carried out by translating them into ``modelslim_v1``."""
