"""The on-device daemon: serving, routing, learning, episodes, local HTTP API, sync."""
