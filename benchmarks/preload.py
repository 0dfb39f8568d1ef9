"""What stages import, imported once: for a process that is forked for each command of a test or of kills.py.

What libraries compute at their first use is computed here too: transformers compiles a thousand patterns before it
loads its first model, matplotlib reads its list of fonts.
"""

import gc
import importlib

LIBRARIES = ("accelerate", "datasets", "matplotlib.pyplot", "opencc", "scipy.stats", "sklearn.metrics", "typeguard")
LIBRARIES += ("tyro", "transformers.models.qwen3.modeling_qwen3", "transformers.trainer", "peft")
LIBRARIES += ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.grpo_trainer")
LIBRARIES += ("trl.trainer.reward_trainer", "trl.experimental.kto")

for library in LIBRARIES:
    importlib.import_module(library)
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen3")
gc.collect()
gc.freeze()  # the garbage collector of a fork then leaves the libraries out
