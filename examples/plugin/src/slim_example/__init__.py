"""A processor, a saver and a service for Slim, as an example of how to add one."""
