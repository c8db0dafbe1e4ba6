"""The routes, a file a dialect; each has a `router`."""
