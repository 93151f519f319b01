"""Other libraries' language models, in PyTorch: the same architecture and size, random weights.

transformers (Hugging Face), whose Mamba goes by mambapy's parallel scan where that is installed;
torchscale, whose RetNet goes by chunks.
"""

import functools
import importlib
from importlib.util import find_spec
from typing import Any

from .. import timing
from .peers import Absent, attempted
from .table import Row
from .whole_models import RATE, THEIRS, Decoding, Training, text

LIBRARIES = {
    "transformers": tuple(name for name in THEIRS if "model_type" in THEIRS[name]),
    "torchscale": ("retnet",),
}


def training(library: str, name: str, rows: int, length: int) -> Training:
    """Absent if it cannot run here, or does not have the model."""
    return attempted(functools.partial(_training, library, name, rows, length), library)


def decoding(library: str, name: str, rows: int, tokens: int) -> Decoding:
    """Absent if it cannot run here, or does not decode."""
    return attempted(functools.partial(_decoding, library, name, rows, tokens), library)


def _training(library: str, name: str, rows: int, length: int) -> Training:
    torch, model, logits, about = _model(library, name)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    given = torch.tensor(text(rows, length + 1), device=device).long()

    def forward():
        with torch.no_grad():
            return logits(given[:, :-1])

    def step():
        found = logits(given[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(found, given[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for call in (forward, step):
        call()
    return Training(forward, step, _wait(torch), about)


def _decoding(library: str, name: str, rows: int, tokens: int) -> Decoding:
    if library == "torchscale":
        raise Absent("it has no loop that decodes")
    torch, model, _, about = _model(library, name)
    given = torch.tensor(text(rows, 1), device=model.device).long()
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    how |= {"min_new_tokens": tokens, "max_new_tokens": tokens}

    def decode():
        with torch.no_grad():
            return model.generate(given, **how).cpu()

    decode()
    return Decoding(decode, _wait(torch), about)


def _model(library: str, name: str) -> tuple[Any, Any, Any, Row]:
    """torch, the model, its logits of tokens (B, T), and what is known of it."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(timing.available())
    model, logits = {"transformers": _transformers, "torchscale": _torchscale}[library](torch, name)
    if torch.cuda.is_available():
        model = model.cuda()
    about: Row = {"parameters": sum(x.numel() for x in model.parameters())}
    return torch, model.float(), logits, about


def _transformers(torch: Any, name: str) -> tuple[Any, Any]:
    library: Any = importlib.import_module("transformers")
    values = dict(THEIRS[name])
    if name == "mamba" and find_spec("mambapy"):
        values["use_mambapy"] = True
    config = library.AutoConfig.for_model(**values)
    model = library.AutoModelForCausalLM.from_config(config)
    return model, lambda tokens: model(tokens, use_cache=False).logits


def _torchscale(torch: Any, name: str) -> tuple[Any, Any]:
    config = importlib.import_module("torchscale.architecture.config").RetNetConfig(**THEIRS[name])
    retnet = importlib.import_module("torchscale.architecture.retnet")
    embedding = torch.nn.Embedding(config.vocab_size, config.decoder_embed_dim)
    model = retnet.RetNetDecoder(config, embed_tokens=embedding)
    return model, lambda tokens: model(tokens)[0]


def _wait(torch: Any) -> Any:
    return (lambda _: torch.cuda.synchronize()) if torch.cuda.is_available() else lambda _: None
