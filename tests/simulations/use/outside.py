"""Run by another interpreter, in which this project is not: what an export is to others.

``outside.py SITE_PACKAGES KIND OUT IDS FOLDER...``: the numbers of each folder go to OUT.
"""

import importlib.util
import json
import sys

sys.path.append(sys.argv[1])
for name in ("deal_core", "client", "server", "simulations"):
    if importlib.util.find_spec(name) is not None:
        sys.exit(f"{name} is here")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

_, _, kind, out, ids, adapter, merged, moved = sys.argv
torch.set_num_threads(1)
suffix = "ForCausalLM" if kind == "causal" else ""
plain = getattr(transformers, "AutoModel" + suffix)
auto_peft = getattr(peft, "AutoPeftModel" + (suffix or "ForFeatureExtraction"))
models = {
    "peft": lambda: auto_peft.from_pretrained(adapter),
    "transformers": lambda: plain.from_pretrained(adapter),
    "merged": lambda: plain.from_pretrained(merged),
}
if moved:
    models["moved"] = lambda: peft.PeftModel.from_pretrained(
        plain.from_pretrained(f"{moved}/base"), moved
    )
tokens = torch.tensor([json.loads(ids)])
numbers = {}
for name, load in models.items():
    model = load().eval()
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        output = model(input_ids=tokens)
    numbers[name] = output.logits if suffix else output.last_hidden_state
save_file({name: value.contiguous().clone() for name, value in numbers.items()}, out)
tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
print(json.dumps(tokenizer("spinal block")["input_ids"]))
