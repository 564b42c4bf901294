"""Several processes that work on one run: started, connected, and watched."""
