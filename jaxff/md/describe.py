"""What a model file holds, in words."""
