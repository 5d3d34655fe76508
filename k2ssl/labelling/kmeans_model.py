"""Cluster centres: assigning labels with them, and the file they are kept in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2ssl.atomic_file import save_atomically
from k2ssl.labelling.features import Scalar
from k2ssl.labelling.nearest import Centres

FORMAT = "k2ssl-kmeans"
VERSION = 1


class KMeans:
    """K centres of D-dimensional frames.

    Args:
        centroids: (K, D), finite, also in float32, in which they are kept on the CPU.
        description: plain values that name the features the centres were fitted to (`FeatureFunction.description`).

    Raises:
        ValueError: a wrong shape, or a centre that is not finite, named by its number.
    """

    def __init__(self, centroids: Tensor, description: Mapping[str, Scalar] | None = None) -> None:
        if centroids.dim() != 2 or 0 in centroids.shape:
            raise ValueError(f"KMeans: centroids have shape {tuple(centroids.shape)}, (clusters >= 1, dimensions >= 1) is needed")
        self.centroids = centroids.detach().to("cpu", torch.float32).clone()
        bad = (~self.centroids.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"KMeans: centroids {bad[:10]} are not finite in float32")
        self.description: dict[str, Scalar] = dict(description or {})
        self._ready: dict[torch.device, Centres] = {}

    @property
    def num_clusters(self) -> int:
        return self.centroids.shape[0]

    @property
    def dim(self) -> int:
        return self.centroids.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the centres and the description, whatever file they are in."""
        header = {"shape": list(self.centroids.shape), "description": self.description}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        digest.update(self.centroids.numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def assign(self, features: Tensor) -> Tensor:
        """(F, D) to (F,) int64 on the same device: the number of the nearest centre exactly as float64 has it, the lowest of equals.

        Features are taken as float32, so those of float64 are rounded first.

        Raises:
            ValueError: a wrong shape, or frames that are not finite in float32, the first one named.
        """
        features = self._checked(features)
        return self._centres(features.device).nearest(features, exact=True)

    def inertia(self, features: Tensor) -> float:
        """Mean over frames of the squared distance to the nearest centre; `features` (F >= 1, D) and errors as for `assign`."""
        features = self._checked(features)
        if not len(features):
            raise ValueError("KMeans: the inertia of no frames is undefined, at least 1 is needed")
        centres = self._centres(features.device)
        return centres.squared_distances(features, centres.nearest(features, exact=True)).double().mean().item()

    def save(self, path: str | Path) -> None:
        """Write the centres; the file appears under its name only when it is whole, and replaces an older one then.

        Raises:
            OSError: the folder does not exist or cannot be written to.
        """
        content = {"format": FORMAT, "version": VERSION, "centroids": self.centroids, "description": self.description}
        save_atomically(path, {**content, "sha256": self.sha256})

    @classmethod
    def load(cls, path: str | Path) -> KMeans:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, is not one of ours, was written by a later version, or was altered.
        """
        content = read_checked(path, FORMAT, VERSION, ("centroids", "description", "sha256"))
        model = cls(content["centroids"], content["description"])
        if model.sha256 != content["sha256"]:
            raise ValueError(f"{path}: the centres have sha256 {model.sha256}, the file says {content['sha256']}: it was altered")
        return model

    def _centres(self, device: torch.device) -> Centres:
        if device not in self._ready:
            self._ready[device] = Centres(self.centroids.to(device))
        return self._ready[device]

    def _checked(self, features: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"KMeans: features have shape {tuple(features.shape)}, (frames, {self.dim}) is needed")
        features = features.float()
        check_finite(features, "features")
        return features


def check_finite(features: Tensor, what: str) -> None:
    """Refuse frames with NaN or infinite values; waits for the device.

    Raises:
        ValueError: names the first such frame, the dimension and the value.
    """
    finite = features.isfinite()
    if not finite.all():
        frame, dimension = (~finite).nonzero()[0].tolist()
        value = features[frame, dimension].item()
        raise ValueError(f"{what}: frame {frame} has the value {value} in dimension {dimension}, finite values are needed")


def read_checked(path: str | Path, kind: str, version: int, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """The content of a file that `save_atomically` wrote with {"format": kind, "version": version} and `keys`.

    Raises:
        ValueError: unreadable, another format or version, or a missing key.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises depends on the file's first bytes
        raise ValueError(f"{path}: a {kind} file is needed, {_what_it_is(Path(path))}") from error
    if not isinstance(content, Mapping) or content.get("format") != kind:
        if isinstance(content, Mapping) and "format" in content:
            raise ValueError(f"{path}: format is {content['format']!r}, {kind!r} is needed")
        found = f"a table of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{path}: a {kind} file is needed, it holds {found}")
    if content.get("version") != version:
        raise ValueError(f"{path}: version is {content.get('version')!r}, this release reads version {version}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    return content


def _what_it_is(path: Path) -> str:
    """What lies at a path that torch cannot read, in a few words."""
    if not path.is_file():
        return "this is a folder" if path.is_dir() else "there is no such file"
    try:
        with path.open("rb") as file:
            begin = file.read(40)
    except OSError as error:
        return f"this one cannot be read ({error.strerror or error})"
    if not begin:
        return "this one is empty"
    if begin.startswith(b"PK"):
        return "this one is cut off, damaged, or holds more than plain values and tensors"
    if begin.startswith(b"\x1f\x8b"):
        return "this one is compressed by gzip"
    text = begin.decode("ascii", errors="replace").partition("\n")[0].strip()
    return (
        f"this one is text: {text!r}" if text.isprintable() and text.isascii() else f"this one begins with the bytes {begin[:8].hex(' ')}"
    )
