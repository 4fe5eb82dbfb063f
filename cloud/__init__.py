"""The catalogue service: sync server, operator API and shell, and a broker for trying."""
