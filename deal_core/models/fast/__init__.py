"""Speed alone: every module here has a plain path with the same answers, which tests compare with.

* ``attention``: three plain operations for short texts; the plain path is transformers' own.
* ``prompt_forest``: prompts that begin alike, and their answers, in one row; each prompt alone.
* ``lower_layers``: what lies below the first adapted layer, kept by prompt; a pass through all.
"""
