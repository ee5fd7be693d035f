"""The local loop and what it needs: batches, teachers, precision; no method, no mechanism."""
