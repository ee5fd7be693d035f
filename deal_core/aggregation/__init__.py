"""How client updates become one adapter: a rule, and before it a screen and a robust step."""
