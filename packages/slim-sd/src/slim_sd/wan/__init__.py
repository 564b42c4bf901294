"""Wan models as their own project publishes them: names, folders, parts, captured calls."""
