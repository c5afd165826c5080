"""Training: labelled frames, labels from a teacher, the loss and the loop. Modules load on first use."""
