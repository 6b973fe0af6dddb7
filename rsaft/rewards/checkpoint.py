"""Reading published weights: a hub id, folder or file becomes a dict of tensors. Nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsaft.errors import ConfigError

Source = str | os.PathLike[str]


def find_file(source: Source, names: Sequence[str], reward: str) -> Path:
    """The local path of a checkpoint's weights, downloaded if `source` is a hub id.

    Args:
        source: a file, a folder, or a hub id ("owner/name").
        names: what the file may be called in a folder or on the hub, the best first; paths with folders are allowed.
        reward: for the messages.

    Raises:
        ConfigError: if there is no such file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ConfigError(f"{reward}: the folder '{path}' holds none of {_listed(names)}; give the file itself.")
    if len(path.parts) != 2 or path.is_absolute() or str(source).startswith("."):
        raise ConfigError(f"{reward}: there is no file or folder '{path}', and a hub id has the form owner/name.")
    return _from_hub(str(source), names, reward)


def _from_hub(repository: str, names: Sequence[str], reward: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # a child of EntryNotFoundError: the hub could not be asked
            offline = (
                f"{reward}: '{repository}' is no file or folder here, {name} of it is not in the cache, and the hub "
                "cannot be reached; download it where there is a network, and give its path."
            )
            if name == names[-1]:
                raise ConfigError(offline) from error
        except EntryNotFoundError:
            continue
        except GatedRepoError as error:
            raise ConfigError(
                f"{reward}: the hub keeps '{repository}' behind a licence; accept that on its page, and log in with "
                "`hf auth login`."
            ) from error
        except (HfHubHTTPError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{reward}: '{repository}' is no file or folder here, and the hub says: {reason}."
            ) from error
    raise ConfigError(f"{reward}: the hub's '{repository}' holds none of {_listed(names)}; give the file itself.")


def beside(path: Path, source: Source, name: str) -> Path | None:
    """The file `name` in the folder of `path`, or where `path` came from on the hub; None if there is none."""
    if (path.parent / name).is_file():
        return path.parent / name
    if Path(source).expanduser().exists():
        return None
    try:
        return find_file(source, [name], "")
    except ConfigError:
        return None


def read_weights(path: Path, reward: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of torch.save, without running code that such a file may hold.

    What lies under the key `state_dict` is taken out, and the prefix `module.` of distributed training is dropped.

    Raises:
        ConfigError: if the file is damaged or holds something other than tensors by name.
    """
    content = _read_safetensors(path, reward) if path.suffix == ".safetensors" else _read_torch(path, reward)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = f"keys {_listed(list(content)[:5])}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ConfigError(
            f"{reward}: '{path}' should hold tensors by name, alone or under 'state_dict'; it holds {found}; give the "
            "published weights."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _read_safetensors(path: Path, reward: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(_damaged(path, reward, error)) from error


def _read_torch(path: Path, reward: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise ConfigError(
                f"{reward}: '{path}' holds Python objects besides tensors, and loading those would run code from the "
                "file; save its state_dict() where you trust it, and give that."
            ) from error
        raise ConfigError(_damaged(path, reward, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(_damaged(path, reward, error)) from error


def _damaged(path: Path, reward: str, error: Exception) -> str:
    reason = " ".join(str(error).split("\n")[0].split())[:160].rstrip(".")
    return f"{reward}: '{path}' cannot be read ({reason or type(error).__name__}); it may be cut short: fetch it again."


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], path: Path, reward: str) -> None:
    """Put `weights` into `module`, which may be on the meta device; each must be there, fit, and be wanted.

    Raises:
        ConfigError: names the file and the first key that is missing, of another shape, or unknown.
    """
    expected = module.state_dict()
    missing, unknown = [k for k in expected if k not in weights], [k for k in weights if k not in expected]
    if missing:
        raise ConfigError(
            f"{reward}: '{path}' lacks the key '{missing[0]}'{_more(missing)}; it is no checkpoint of this model."
        )
    if unknown:
        raise ConfigError(
            f"{reward}: '{path}' holds the key '{unknown[0]}'{_more(unknown)}, which this model does not have."
        )
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            raise ConfigError(
                f"{reward}: '{path}', key '{key}' has the shape {tuple(weights[key].shape)}, and this model needs "
                f"{tuple(value.shape)}."
            )
    module.load_state_dict(dict(weights), assign=True)


def take(weights: dict[str, Tensor], key: str, path: Path, reward: str) -> Tensor:
    """Remove and return one tensor.

    Raises:
        ConfigError: names the file and the key if it is missing.
    """
    if key not in weights:
        raise ConfigError(f"{reward}: '{path}' lacks the key '{key}'; it is no checkpoint of this model.")
    return weights.pop(key)


def _more(keys: Sequence[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(f"'{name}'" for name in names)
