"""The site's folder, its commands, and the gate before Flower's programs."""
