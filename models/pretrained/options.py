"""config.json of a published checkpoint: every option in it is read, or it is an error."""

import json
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

REQUIRED = object()
LARGEST = 3e38  # what float32 holds
LONGEST = 2**27  # bytes of a JSON file

# What every library writes beside the model's own options; none of it changes what is computed.
NEUTRAL = frozenset(
    """
    _name_or_path _attn_implementation _attn_implementation_autoset architectures auto_map
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    chunk_size_feed_forward dtype torch_dtype id2label label2id initializer_range init_std
    is_decoder is_encoder_decoder max_length max_position_embeddings max_sequence_length min_length
    finetuning_task name_or_path output_attentions output_hidden_states prefix problem_type
    return_dict task_specific_params tokenizer_class torchscript transformers.js_config
    transformers_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


class Options:
    """The options by name; each method reads one, checks its type, and counts it as known.

    A missing option and one that is null give the default; without a default they are an error.
    Sizes are at most `most`: what the files hold, so that a wrong one cannot exhaust the memory;
    what is there so many times, with tensors of its own, at most `tensors`. `held` are the names
    of the files' tensors, None where there are no files.
    """

    def __init__(
        self,
        values: dict[str, Any],
        most: int = 2**31,
        tensors: int = 2**20,
        held: Container[str] | None = None,
    ):
        self.values, self.most, self.tensors, self.held = values, most, tensors, held
        self.known = set[str](NEUTRAL)

    def whole(
        self, name: str, default: Any = REQUIRED, least: int = 1, most: int | None = None
    ) -> Any:
        """A size or a count: a whole number from `least` to `most` (None: what the files hold)."""
        most = self.most if most is None else most
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        if not least <= value <= most:
            raise self._wrong(name, f"a number from {least} to {most}, of the files' sizes")
        return value

    def count(self, name: str, default: Any = REQUIRED) -> Any:
        """How often something is there that has tensors of its own: layers, experts."""
        return self.whole(name, default, most=self.tensors)

    def number(self, name: str, default: Any = REQUIRED, least: float = -LARGEST) -> Any:
        """A number of float32, at least `least`."""
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not least <= value <= LARGEST:  # nor nan
            raise self._wrong(name, f"a finite number{f' from {least:g}' * (least > -LARGEST)}")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        return self._typed(name, default, bool, "true or false")

    def text(self, name: str, default: Any = REQUIRED) -> str:
        return self._typed(name, default, str, "a text")

    def each(self, name: str, default: Any = REQUIRED) -> list[Any]:
        return self._typed(name, default, list, "a list")

    def mapping(self, name: str, default: Any = REQUIRED) -> "Options":
        """The options inside one, which names them as `outer.inner`."""
        value = self._typed(name, default, dict, "a mapping")
        inner = {f"{name}.{key}": each for key, each in (value or {}).items()}
        return Options(inner, self.most, self.tensors)

    def unless(self, default: Any, name: str) -> Any:
        """The default of an option for which null means None."""
        return None if name in self.values else default

    def expect(self, name: str, *supported: Any) -> None:
        """An option of which only these values are supported; missing or null is, too."""
        value = self._get(name, None)
        if value is not None and not any(value == s and type(value) is type(s) for s in supported):
            raise self._wrong(name, " or ".join(json.dumps(s) for s in supported) or "null")

    def skip(self, *names: str) -> None:
        """Options that change how it is computed, or how training began, but not what."""
        self.known.update(names)

    def done(self) -> None:
        """ValueError for options that nobody asked for: the model may not be what we made of it."""
        unknown = {n: v for n, v in self.values.items() if n not in self.known and v is not None}
        if unknown:
            wrong = shown(f"{name}={json.dumps(value)[:60]}" for name, value in unknown.items())
            raise ValueError(f"config.json: not supported for this kind of model: {wrong}")

    def _get(self, name, default):
        self.known.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"config.json has no {name}")
        return default

    def _typed(self, name, default, kind, wanted):
        value = self._get(name, default)
        if value is default or isinstance(value, kind):
            return value
        raise self._wrong(name, wanted)

    def _wrong(self, name, wanted):
        value = json.dumps(self.values[name])[:80]
        return ValueError(f"config.json: {name}={value} is not supported; it can be {wanted}")


def read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. ValueError if it holds none, or a name twice."""
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{path} has more than {LONGEST} bytes: it is no file of options")
    try:
        values = json.loads(path.read_text("utf-8"), object_pairs_hook=_mapping)
    except (ValueError, RecursionError) as error:  # nor UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not JSON: {shown([str(error)])}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a mapping of options")
    return values


def same(values: dict[str, Any], before: dict[str, Any] | None) -> None:
    """ValueError for options that changed since; `before` is None where nobody knows."""
    names = [] if before is None else sorted((values.keys() | before.keys()) - NEUTRAL)
    for name in names:
        now, then = (json.dumps(v.get(name), sort_keys=True) for v in (values, before or {}))
        if now != then:
            raise ValueError(
                f"config.json: {shown([name])}={now[:60]} was {then[:60]} when the weights were "
                "written"
            )


def shown(names: Iterable[str]) -> str:
    """The first few of a list of names, in one line, and how many there are."""
    names = list(names)
    first = [(name if name.isprintable() else json.dumps(name))[:120] for name in names[:8]]
    return ", ".join(first) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _mapping(pairs):
    """transformers writes what JSON has no number for as {"__float__": "Infinity"}."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"there twice: {shown(twice)}")
    if mapping.keys() == {"__float__"} and isinstance(mapping["__float__"], str):
        return float({"Infinity": "inf", "-Infinity": "-inf"}.get(mapping["__float__"], "nan"))
    return mapping
