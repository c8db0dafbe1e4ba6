import pytest
import torch
from gguf_models import CONFIG, tensors_of, vocabulary

import gemmakit
from gemmakit.checkpoint.formats.gguf_writing import write_gguf


@pytest.fixture(scope="session")
def model():
    """A small Gemma in bfloat16 with rows of 32 and more; norms away from zero, all numbers multiples of 2**-12."""
    torch.manual_seed(0)
    made = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**CONFIG)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = 0.3 if "norm" in name else 0.1
            numbers = torch.randn(parameter.shape).clamp(-3, 3) * scale
            parameter.copy_((numbers * 4096).round().to(torch.bfloat16).float() / 4096)
    return made.eval()


@pytest.fixture(scope="session")
def files(model, tmp_path_factory):
    """kind -> a GGUF file of the model."""
    folder = tmp_path_factory.mktemp("gguf")
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0")
    return {
        kind: write_gguf(folder / f"{kind}.gguf", model.config, tensors_of(model), vocabulary(), kind) for kind in kinds
    }
