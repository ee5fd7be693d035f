"""What was learnt, put to use: ``deal predict`` and ``deal export``."""
