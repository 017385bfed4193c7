"""The first room: images to features to figures, calls to times."""
