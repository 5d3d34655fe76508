"""Dictionaries to dataclasses and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from k2ssl.models.frontend import LogMelConfig, WaveformConfig
from k2ssl.models.hubert import HubertConfig
from k2ssl.models.masking import MaskingConfig
from k2ssl.models.prediction_head import HeadConfig
from k2ssl.models.transformer import TransformerConfig
from k2ssl.models.zipformer import ZipformerConfig
from k2ssl.structure import from_dict, to_dict


@dataclass(frozen=True)
class Inner:
    size: int = 3
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"Inner: size is {self.size}")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    mode: Literal["a", "b"] = "a"
    pairs: tuple[tuple[int, int], ...] = ()
    scales: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    flag: bool = False


@pytest.mark.parametrize(
    "config",
    [
        HubertConfig.zipformer_base(),
        HubertConfig.zipformer_large(),
        HubertConfig.hubert_base(),
        HubertConfig.hubert_large(),
        HubertConfig(frontend=LogMelConfig(), encoder=TransformerConfig.tiny(), label_rate=(100.0,)),
        HubertConfig(frontend=WaveformConfig(normalize_audio=False)),
    ],
)
def test_configurations_come_back_equal_through_json(config: HubertConfig) -> None:
    assert from_dict(HubertConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_absent_keys_take_defaults_and_whole_numbers_serve_as_floats() -> None:
    made = from_dict(Outer, {"name": "x", "inner": {"rate": 1}, "pairs": [[1, 2]], "scales": {"a": 2}, "limit": 3})
    assert made == Outer("x", Inner(rate=1.0), pairs=((1, 2),), scales={"a": 2.0}, limit=3.0)
    assert isinstance(made.inner.rate, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "inner": {"sise": 3}}, r"inner\.sise: unknown key; known keys are rate, size"),
        ({"inner": {}}, "name: this key is missing"),
        ({"name": 5}, "name: is 5 of type int, str is needed"),
        ({"name": "x", "inner": {"size": True}}, r"inner\.size: is True of type bool, int is needed"),
        ({"name": "x", "inner": {"size": 2.0}}, r"inner\.size: is 2\.0 of type float, int is needed"),
        ({"name": "x", "flag": 0}, "flag: is 0 of type int, bool is needed"),
        ({"name": "x", "inner": 4}, "inner: a table of keys is needed, not 4"),
        ({"name": "x", "inner": {"size": -1}}, "inner: Inner: size is -1"),
        ({"name": "x", "mode": "c"}, "mode: is 'c', allowed are 'a', 'b'"),
        ({"name": "x", "pairs": [[1, 2], [3]]}, r"pairs\[1\]: has 1 entries, 2 are needed"),
        ({"name": "x", "pairs": 3}, "pairs: a list is needed"),
        ({"name": "x", "scales": {"a": "b"}}, r"scales\.a: is 'b'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, data)


@pytest.mark.parametrize("encoder", [{}, {"kind": "conformer"}, 3])
def test_one_of_several_dataclasses_is_named_by_kind(encoder: object) -> None:
    with pytest.raises(ValueError, match=r"encoder\.kind: is .* allowed are transformer, zipformer"):
        from_dict(HubertConfig, {"encoder": encoder})
    assert from_dict(HubertConfig, {"encoder": {"kind": "transformer", "num_layers": 3}}).encoder == TransformerConfig(num_layers=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadConfig(num_classes=504), "HeadConfig: num_classes: a list is needed, not 504"),
        (lambda: HeadConfig(num_classes=(504.5,)), r"HeadConfig: num_classes\[0\]: is 504\.5 of type float, int is needed"),
        (lambda: ZipformerConfig(dim=192), "ZipformerConfig: dim: a list is needed"),
        (lambda: ZipformerConfig(pos_dim="48"), "ZipformerConfig: pos_dim: is '48' of type str"),
        (lambda: WaveformConfig(layers=(10, 5)), r"WaveformConfig: layers\[0\]: a list is needed, not 10"),
        (lambda: MaskingConfig(length=10.5), "MaskingConfig: length: is 10.5 of type float"),
        (lambda: HubertConfig(label_rate=50.0), "HubertConfig: label_rate: a list is needed"),
        (lambda: HubertConfig(encoder=WaveformConfig()), "HubertConfig: encoder"),
    ],
)
def test_configurations_made_in_python_are_checked_for_types(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_could_not_be_read_back_is_not_stored() -> None:
    with pytest.raises(ValueError, match="name: a object cannot be stored"):
        to_dict(Outer(object()))  # type: ignore[arg-type]
