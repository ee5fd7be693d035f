"""Speed alone: every module here has a plain path with the same answers, which tests compare with.

* ``attention``: three plain operations for short texts, and texts end to end in one row; the plain
  path is transformers' own attention, and each text alone.
* ``prompt_forest``: prompts that begin alike, and their answers, in one row; each prompt alone.
* ``lower_layers``: what lies below the first adapted layer, kept by prompt; a pass through all.
* ``unpacked``: a GGUF file as a folder; the file itself.
"""
