"""What a bundle and a generation are, where they are kept, how they are trusted and travel."""
