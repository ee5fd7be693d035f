"""DEAL: what is retained, what an update may change, what is distilled, class means; and the seam
of a method."""
