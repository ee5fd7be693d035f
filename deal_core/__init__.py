"""The method: LoRA adapters, retention, distillation, aggregation. Knows nothing of Flower."""

import logging

# PEFT imports bitsandbytes wherever it is installed, in every process, and on some processors that
# warns of a faster kernel which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
