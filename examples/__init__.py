"""Programs that show Driftkeel at work."""
