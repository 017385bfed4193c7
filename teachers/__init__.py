"""Teachers: slow, good models to distil from."""
