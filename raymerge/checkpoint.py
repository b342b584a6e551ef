"""Hugging Face checkpoints, opened without being loaded, wherever they are: a folder, the hub, a GGUF file, the demo.

A Checkpoint is a read-only mapping from tensor names to tensors that stay mapped from the safetensors files in their
stored dtype, so that several processes of one machine share the pages and nothing is read before it is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import REPO_ID_SEPARATOR
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raymerge import demo
from raymerge.architectures import Architecture
from raymerge.device import moved
from raymerge.errors import UserError
from raymerge.families import architecture_of, deepstack_layers, language_config
from raymerge.file_hashes import FileState, known_hashes, sha256_of
from raymerge.gguf_input import SOURCE_FILE, converted_gguf, gguf_file_of
from raymerge.hub import fetch
from raymerge.identity import digest
from raymerge.positions import attention_windows, rotary_types
from raymerge.skeleton import skeleton_of
from raymerge.tensorfiles import DTYPES, ITEM_BYTES, is_finite
from raymerge.towers import names_inside, whole_model

WEIGHT_INDEX = "model.safetensors.index.json"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.model.v[0-9]", "*.txt", "*.jinja", "*.md"]
_HUB_PATTERNS += ["LICENSE", "LICENCE", "LICENSE-MODEL", "NOTICE", "Notice"]
# The same weights once more: Mistral's and Meta's own files, and those of other runtimes.
_NOT_FETCHED = ["consolidated*", "original/*", "onnx/*"]
# What transformers and mistral-common read tokenizers from. No looser: a folder may hold a `token` of the user's too.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.[0-9]*.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v[0-9]*",
    "tiktoken.model",
    "tekken.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# What transformers raises on files that are not as it expects them; the last is raised where a config refuses a value.
_UNREADABLE = (ValueError, OSError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError)


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written as asked; the message names the file and the cure."""


def is_on_hub(path: str) -> bool:
    """Whether a model's path is a hub id, not something on this machine; CheckpointError where it is neither."""
    folder = Path(path).expanduser()
    if path == "demo" or folder.is_dir() or gguf_file_of(folder) is not None:
        return False
    if folder.exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no model folder {path}: give a folder, a hub id such as owner/name, or demo")
    return True


def resolve_model(path: str, revision: str | None = None, *, code: bool = False) -> Path:
    """The local folder of a model: "demo", a folder, or a hub id, which is downloaded (safetensors only).

    code: download the repository's own Python as well. A .gguf file, or a folder with one and no config, is
    dequantised once, and the result's folder is returned. CheckpointError for a revision of a local model.
    """
    if is_on_hub(path):
        from huggingface_hub import snapshot_download

        what = f"no local folder {path!r}, and the model {path!r} (revision {revision or 'main'})"
        allowed = _HUB_PATTERNS + ["*.py"] * code

        def download() -> str:
            return snapshot_download(path, revision=revision, allow_patterns=allowed, ignore_patterns=_NOT_FETCHED)

        return fetch(what, download, CheckpointError)
    if revision is not None:
        raise CheckpointError(f"revision {revision!r} is for hub models, but {path} is local: leave it out")
    if path == "demo":
        return demo.MODEL_PATH
    folder = Path(path).expanduser()
    gguf = gguf_file_of(folder)
    return folder if gguf is None else converted_gguf(gguf)


def _cached_of(folder: Path) -> tuple[str | None, str | None]:
    """The hub id and the commit of a folder of the hub's cache (models--OWNER--NAME/snapshots/COMMIT); else None."""
    folder = folder.resolve()
    kind, *names = folder.parent.parent.name.split(REPO_ID_SEPARATOR)
    if kind != "models" or folder.parent.name != "snapshots" or not names:
        return None, None
    return "/".join(names), folder.name


class Checkpoint(Mapping[str, Tensor]):
    """An opened checkpoint. Indexing gives a tensor in its stored dtype, mapped from disk, on the CPU.

    Tied embeddings are resolved: the unembedding's name always works. A tensor that holds NaN or infinite values is
    refused by name when it is first read. `name` is the path that was asked for; `hub_id` and `revision` say which
    model of the hub that is, also for a folder of the hub's own cache, and are None for any other.
    `config` is the language model's, also where that is inside a multimodal model (`whole_config`), whose towers are
    tensors like any others that belong to no layer.
    """

    def __init__(self, path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False):
        from transformers import AutoConfig

        path = os.fspath(path)
        self.name, self.directory = path, resolve_model(path, revision, code=trust_remote_code)
        self.hub_id, self.revision = (path, revision) if is_on_hub(path) else _cached_of(self.directory)
        self.trust_remote_code = trust_remote_code
        if not (self.directory / "config.json").is_file():
            inside = sorted(found.parent for found in self.directory.glob("models/*/config.json"))
            hint = f"; did you mean a run's model, {' or '.join(map(str, inside))}?" if inside else ""
            if (self.directory / "adapter_config.json").is_file():
                hint = ", but an adapter; merge it into its base first (peft: merge_and_unload, save_pretrained)"
            raise CheckpointError(f"{self.directory} has no config.json: it is not a Hugging Face checkpoint{hint}")
        declared = read_json(self.directory / "config.json")
        if declared.get("quantization_config") is not None:
            raise CheckpointError(f"{self.directory} is quantised: merge the unquantised checkpoint, then quantise")
        try:
            whole = AutoConfig.from_pretrained(self.directory, trust_remote_code=trust_remote_code)
        except (*_UNREADABLE, ArithmeticError) as error:
            kind = declared.get("model_type")
            raise CheckpointError(f"transformers cannot read {self.directory} (model type {kind}): {error}") from error
        self.whole_config, self.config = whole, language_config(whole)
        #: Whether the language model is a part of the model that is stored.
        self.multimodal: bool = self.config is not whole
        #: How many of the first layers features of images are added to, which must stay as and where they are.
        self.deepstack_layers = deepstack_layers(whole)
        self.architecture: Architecture = architecture_of(self.config)
        self.n_layers: int = self.config.num_hidden_layers
        self.windows = attention_windows(self.config)
        self.rotary_types = rotary_types(self.config)
        self._files = _weight_files(self.directory)
        self._handles = {}
        self._where: dict[str, Path] = {}
        for file in self._files:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}; fetch it again") from error
            buffers = self.architecture.buffers
            names = [name for name in self._handles[file].keys() if not name.endswith(buffers)]
            self._where.update(dict.fromkeys(names, file))
        self._finite: set[str] = set()
        if self.multimodal:
            self.architecture = names_inside(self.architecture, self._where)
            self.config.tie_word_embeddings = whole.tie_word_embeddings  # which decides, whatever the part's own says
        self._check_complete()
        self._check_layers()
        self._check_shapes()
        #: Names of tensors that transformers' whole model has no place for, as it spells them; of multimodal models.
        self.unknown: tuple[str, ...] = self._checked_whole(whole) if self.multimodal else ()
        self._tie()

    def _check_complete(self) -> None:
        arch = self.architecture
        wanted = [arch.embedding] + [
            arch.layer_name(layer, f"{matrix}.weight") for layer in range(self.n_layers) for matrix in arch.matrices
        ]
        if not self.tied:
            wanted.append(arch.unembedding)
        if missing := [name for name in wanted if name not in self._where]:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} tensors that its config requires, such as {missing[:3]}: "
                "fetch it again"
            )

    def _check_layers(self) -> None:
        """Refuse layers beyond the config's number, and tensors among the layers' that belong to no numbered layer."""
        root, _, end = self.architecture.layer_prefix.partition("{}")
        numbers: dict[int, str] = {}
        for name in self._where:
            if name.startswith(root):
                number = name.removeprefix(root).split(end)[0]
                if not re.fullmatch("[0-9]+", number):
                    raise CheckpointError(
                        f"{self._where[name]}: {name} belongs to no numbered layer and would be lost in a merge: the "
                        "model's layers share tensors, which is not supported, or the file is damaged"
                    )
                numbers[int(number)] = name
        if beyond := sorted(number for number in numbers if number >= self.n_layers):
            raise CheckpointError(
                f"the config of {self.directory} says {self.n_layers} layers, but there are tensors of layer "
                f"{beyond[-1]}, such as {numbers[beyond[-1]]}: correct num_hidden_layers"
            )

    def _check_shapes(self) -> None:
        """Refuse a tensor of another shape than the config's model has, or of a dtype that is not averaged; and layers
        that have other norms or biases."""
        from transformers import AutoModelForCausalLM

        try:
            skeleton = skeleton_of(AutoModelForCausalLM, self.config, trust_remote_code=self.trust_remote_code)
        except (*_UNREADABLE, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(
                f"transformers cannot build the model that {self.directory}/config.json describes: {error}"
            ) from error
        root, _, norm = self.architecture.loaded.final_norm.removesuffix(".weight").rpartition(".")
        inside = getattr(skeleton, root, None)
        if missing := [part for part in ("layers", norm, "rotary_emb") if not hasattr(inside, part)]:
            raise CheckpointError(
                f"the Python of {self.directory}, which trust_remote_code runs, builds a model without "
                f"{root}.{missing[0]}, by which layers are run one at a time: leave trust_remote_code off, since "
                f"transformers has {self.config.model_type} itself"
            )
        stored_name = self.architecture.stored_name
        expected = {stored_name(name): tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        output, sizes = self.architecture.holder_of("o"), self.architecture.sizes
        shape = expected.get(self.architecture.layer_name(0, f"{output}.weight"))
        heads, channels = sizes["kv_heads"] * sizes["query_heads"], sizes["value_channels"]
        if shape is not None and shape[1] != heads * channels:  # head_dim is a key that some families' code ignores
            raise CheckpointError(
                f"{self.directory}/config.json says head_dim = {channels}, but a {self.config.model_type} of {heads} "
                f"heads has {shape[1] // heads} dimensions in each: take head_dim out of the file"
            )
        for name, file in self._where.items():
            kind, shape = self.stored(name)
            # Averages of integers would be cut to integers, without a scale, and the proof compare like with like.
            whole = self.architecture.has_tensor(name) and kind in DTYPES and not DTYPES[kind].is_floating_point
            if kind not in ITEM_BYTES or whole:
                raise CheckpointError(
                    f"{file}: {name} is stored as {kind}: merge the unquantised checkpoint, then quantise"
                )
            if shape != expected.get(name, shape):
                raise CheckpointError(
                    f"{file}: {name} has shape {shape}, but the config of {self.directory} expects {expected[name]}: "
                    "the file or the config belongs to another model"
                )
        self._check_names(set(expected))

    def _checked_whole(self, config: Any) -> tuple[str, ...]:
        """Names of tensors that are no part of the multimodal model, after refusing one that lacks others, or has them
        in another shape: transformers would make them up."""
        try:
            whole = whole_model(config, {name: self.stored(name)[1] for name in self._where})
        except (*_UNREADABLE, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(
                f"transformers cannot build the model that {self.directory}/config.json describes: {error}"
            ) from error
        if whole.missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(whole.missing)} tensors that its config requires, such as "
                f"{list(whole.missing[:3])}: fetch it again"
            )
        for name, shape, expected in whole.misshapen:
            raise CheckpointError(
                f"{self.directory}: {name} has shape {shape}, but its config expects {expected}: the file or the "
                "config belongs to another model"
            )
        return whole.unknown

    def _check_names(self, expected: set[str]) -> None:
        """Refuse layers without a norm or bias that the config's model has, or with one, or a module, that it has not.

        transformers would initialise a missing tensor and ignore a surplus one. expected: the names of transformers'
        model, in which a layer's experts are joined into one tensor.
        """
        arch = self.architecture
        root = arch.layer_prefix.partition("{}")[0]
        joined = {f"{matrix}.weight" for matrix in (*arch.expert_matrices, *filter(None, [arch.router]))}

        def own(names: Iterable[str]) -> set[str]:
            """Layers' tensors that the family may have, without the joined ones."""
            layers = ((name, name.removeprefix(root).partition(".")[2]) for name in names if name.startswith(root))
            return {name for name, part in layers if part not in joined and arch.has_tensor(name)}

        wanted, there = own(expected), own(self._where)
        wanted |= expected & set(arch.ends)
        there |= set(self._where) & set(arch.ends)
        if missing := sorted(wanted - there):
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} tensors that its config requires, such as {missing[:3]}: "
                "fetch it again"
            )
        # No module of a layer could be given one of these. Others are carried over, as scales of a cache in a module.
        modules = {name.rpartition(".")[0] for name in expected}
        modules |= {module.rpartition(".")[0] for module in modules}
        others = {name for name in self._where if name.startswith(root) and not arch.has_tensor(name)}
        strange = {name for name in others if name.rpartition(".")[0] not in modules}
        if further := sorted((there - wanted) | strange):
            raise CheckpointError(
                f"{self._where[further[0]]}: there are {len(further)} tensors that the config's model has not, such as "
                f"{further[:3]}: the file or the config belongs to another model, or the config lacks an option"
            )

    def _tie(self) -> None:
        """Forget a stored unembedding that is the embedding once more, as transformers does, so that it stays tied."""
        embedding, unembedding = self.architecture.embedding, self.architecture.unembedding
        if self.tied and unembedding in self._where and torch.equal(self[embedding], self[unembedding]):
            del self._where[unembedding]

    @property
    def public_name(self) -> str:
        """What the model may be called where others read it: its hub id, else its folder's or file's name, not where
        that lies."""
        return self.hub_id or Path(os.path.abspath(Path(self.name).expanduser())).name

    @property
    def source(self) -> dict[str, Any] | None:
        """The GGUF file that the checkpoint was dequantised from: file (name), sha256, types; None where it was not."""
        path = self.directory / SOURCE_FILE
        return read_json(path) if path.is_file() else None

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding matrix."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def __getitem__(self, name: str) -> Tensor:
        if name == self.architecture.unembedding and name not in self._where:  # tied, or it would be missing
            name = self.architecture.embedding
        if name not in self._where:
            raise KeyError(name)
        tensor = self._handles[self._where[name]].get_tensor(name)
        if name not in self._finite:  # once a process: 12 GB/s on one core
            if not is_finite(tensor):
                raise CheckpointError(
                    f"{self._where[name]}: {name} holds NaN or infinite values: the file is damaged, fetch it again"
                )
            self._finite.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A stored tensor's dtype, as safetensors names it, and its shape; nothing of it is read."""
        piece = self._handles[self._where[name]].get_slice(name)
        return piece.get_dtype(), tuple(piece.get_shape())

    def layer_tensors(self, layer: int) -> list[str]:
        """Names, relative to the layer, of the tensors that decoder layer `layer` has."""
        prefix = self.architecture.layer_name(layer, "")
        return [name.removeprefix(prefix) for name in self._where if name.startswith(prefix)]

    def layer(self, layer: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """One decoder layer's tensors by relative name. Only converted ones take memory of the process's own: those
        that are of `dtype` and on `device` already stay mapped from disk."""
        name = self.architecture.layer_name
        return {rel: moved(self[name(layer, rel)], device, dtype) for rel in self.layer_tensors(layer)}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The stored dtype of the projection matrices."""
        return self[self.architecture.layer_name(0, f"{self.architecture.matrices[0]}.weight")].dtype

    @cached_property
    def stored_dtypes(self) -> frozenset[torch.dtype]:
        """The floating-point dtypes among the stored tensors."""
        kinds = {self.stored(name)[0] for name in self._where}
        return frozenset(dtype for kind in kinds if (dtype := DTYPES[kind]).is_floating_point)

    @cached_property
    def identity(self) -> str:
        """First 16 hex digits of SHA-256 over the config, the weight files and, where it is run, the model's own
        Python; where the files lie does not matter."""
        config = read_json(self.directory / "config.json")
        # Which transformers wrote it and where from says nothing about what the model computes.
        for key in ("transformers_version", "_name_or_path"):
            config.pop(key, None)
        run = config.get("auto_map") if self.trust_remote_code else None
        code = {file.name: sha256_of(file) for file in files_named(self.directory, ["*.py"])} if run else {}
        with ThreadPoolExecutor() as threads:  # hashing releases the GIL, and large models are many files
            weights = list(threads.map(sha256_of, self._files))
        return digest({"config": config, "weights": weights} | ({"code": code} if code else {}))

    @property
    def known_hashes(self) -> tuple[tuple[FileState, str], ...]:
        """What this process knows of the files that the identity is of, and of the GGUF file behind them, for another
        one to `file_hashes.learn`."""
        gguf = None if self.source is None else gguf_file_of(Path(self.name).expanduser())
        return known_hashes([*self._files, *files_named(self.directory, ["*.py"]), *([] if gguf is None else [gguf])])

    @cached_property
    def tokenizer_identity(self) -> str:
        """First 16 hex digits of SHA-256 over the tokenizer's files, by name."""
        files = files_named(self.directory, TOKENIZER_FILES)
        return digest({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's fast tokenizer."""
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.directory} has no tokenizer that transformers can read: {error}") from error
        # Where the files of its vocabulary are missing, transformers makes an empty one of the class it should have.
        if not found("a", add_special_tokens=False)["input_ids"]:
            raise CheckpointError(
                f"{self.directory} has a tokenizer without a vocabulary ({type(found).__name__}): put the tokenizer's "
                "files there, such as tokenizer.json or tokenizer.model"
            )
        return found

    def size(self, kept: Iterable[int] | None = None) -> tuple[int, int]:
        """Parameters and bytes as stored, of all layers or of those in `kept`; a tied embedding counts once."""
        prefixes = tuple(self.architecture.layer_name(layer, "") for layer in range(self.n_layers))
        wanted = prefixes if kept is None else tuple(prefixes[layer] for layer in kept)
        parameters = stored = 0
        for name in self._where:
            if name.startswith(wanted) or not name.startswith(prefixes):
                kind, shape = self.stored(name)
                parameters += math.prod(shape)
                stored += math.prod(shape) * ITEM_BYTES[kind]
        return parameters, stored

    @property
    def towers(self) -> list[str]:
        """Names of the tensors beside the language model of a multimodal one, which a merge carries over; what lies in
        its layers is no part of them, if the family does not have it either."""
        if not self.multimodal:
            return []
        root = self.architecture.layer_prefix.partition("{}")[0]
        beside = (name for name in self._where if not name.startswith(root))
        return [name for name in beside if not self.architecture.has_tensor(name)]

    def merged_names(self, kept: list[int]) -> dict[str, str]:
        """Every tensor of the model that keeps the layers `kept`, in the order of its files, with the stored tensor
        whose place it takes."""
        name_of = self.architecture.layer_name
        root = self.architecture.layer_prefix.partition("{}")[0]
        names = {name: name for name in self._where if not name.startswith(root)}
        for position, layer in enumerate(kept):
            names |= {name_of(position, rel): name_of(layer, rel) for rel in self.layer_tensors(layer)}
        return names


def files_named(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder whose names fit one of the glob patterns, in order."""
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file; CheckpointError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate, which JSON can escape, no file can hold
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: it is not a JSON object; fetch it again")
    return values


def _weight_files(directory: Path) -> list[Path]:
    index, single = directory / WEIGHT_INDEX, directory / "model.safetensors"
    # In transformers' order. Mistral's folders have the same weights once more in consolidated.safetensors.
    if single.is_file():
        files = [single]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} cannot be read: it has no weight_map; fetch it again")
        if strange := [name for name, file in weight_map.items() if not isinstance(file, str)]:
            raise CheckpointError(
                f"{index} cannot be read: {len(strange)} tensors have no file, such as {strange[:3]}; fetch it again"
            )
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file in its folder: fetch it again")
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if missing := [str(file) for file in files if not file.is_file()]:
        raise CheckpointError(f"weight files are missing: {', '.join(missing)}; fetch them again")
    if not files:
        others = sorted(file.name for file in directory.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, which raymerge never loads: convert it to safetensors" if others else ""
        raise CheckpointError(f"{directory} has no .safetensors weights{hint}")
    return files
