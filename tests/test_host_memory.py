"""Loading and conversion need little more host memory than the checkpoint has bytes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.conftest import ROOT

# Qwen3-4B with smaller widths and fewer layers; 0.55 GB in bf16.
SHAPE = {
    "vocab_size": 60000,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
MEASURE = """
import json, sys
from pathlib import Path
import memlm, torch
from memlm.hub import load_model
from transformers import AutoModelForCausalLM
sys.path.insert(0, "scripts")
import convert_checkpoint

def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

how, source, *target = sys.argv[1:]
with torch.device("meta"):
    memlm.MemLMForCausalLM(memlm.MemLMConfig())
# The peak counts from here.
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS")
if how == "convert":
    convert_checkpoint.read("qwen3", Path(source), Path(target[0]), "msa")
else:
    model = load_model(source) if how == "hub" else AutoModelForCausalLM.from_pretrained(source)
    # Weights are mapped from the file, and count once they are read.
    print(sum(p.sum().item() for p in model.parameters()), file=sys.stderr)
size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
print(json.dumps({"size": size, "peak": held("VmHWM") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of a peak")
def test_a_checkpoint_of_a_4b_shape_loads_within_its_bytes(tmp_path):
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).bfloat16()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    model.tie_weights()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="150MB")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")
    for arguments in (("convert", theirs, ours), ("auto", ours), ("hub", ours)):
        command = [sys.executable, "-c", MEASURE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{arguments[0]}: {found['peak'] / found['size']:.3f} of {found['size']:,} bytes")
        assert found["size"] > 5e8 and found["peak"] <= 1.1 * found["size"], arguments[0]
