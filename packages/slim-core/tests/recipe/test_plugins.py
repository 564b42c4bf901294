from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest

from slim_core.errors import EnvError, SchemaValidateError, UnsupportedError
from slim_core.recipe import (
    ProcessorConfig,
    plugin_names,
    processor_class,
    recipe_from_dict,
    recipe_json_schema,
    saver_class,
    spec_model,
)


class NoiseConfig(ProcessorConfig):
    type: Literal["noise", "hiss"] = "noise"
    level: float = 1.0


@pytest.fixture
def add(install):
    kind = type(install()[0])

    def add(name: str, loaded: Any, **more: Any) -> Any:
        point = kind(name, loaded, package="slim-noise", **more)
        install(point)
        return point

    return add


def spec_of(*process: dict[str, Any]):
    return recipe_from_dict({"apiversion": "modelslim_v1", "spec": {"process": list(process)}}).spec()


def test_a_third_party_adds_a_processor_by_being_installed(add):
    with pytest.raises(SchemaValidateError, match="got 'noise'"):
        spec_of({"type": "noise"})
    noise = SimpleNamespace(Config=NoiseConfig)
    add("noise", noise)
    add("hiss", noise)
    assert spec_of({"type": "noise"}, {"type": "hiss", "level": "1e-3"}).process == (
        NoiseConfig(),
        NoiseConfig(type="hiss", level=1e-3),
    )
    assert processor_class("noise") is noise
    assert "noise" in plugin_names("slim.processors")
    assert "noise" not in plugin_names("slim.savers")


def test_unknown_names(install):
    with pytest.raises(UnsupportedError, match="did you mean 'linear_quant'"):
        processor_class("linear-quant")
    with pytest.raises(UnsupportedError, match="no installed package provides the saver 'compressed_tensors'"):
        saver_class("compressed_tensors")


def test_a_broken_package_is_named_and_hurts_only_recipes_that_use_it(add):
    add("noise", ImportError("libnoise.so: no such file"), value="noise.core:Noise")
    assert spec_of({"type": "iter_smooth"})
    message = (
        r"<recipe>: noise.core:Noise: the processor 'noise' of slim-noise 1.2 cannot be imported: "
        r"ImportError: libnoise.so: no such file \(reinstall or remove slim-noise 1.2\)"
    )
    with pytest.raises(EnvError, match=message):
        spec_of({"type": "noise"})
    with pytest.raises(EnvError, match=r"of slim-noise 1\.2 cannot be imported"):
        spec_of({"type": "group", "configs": [{"type": "noise"}]})
    with pytest.raises(EnvError, match=r"of slim-noise 1\.2 cannot be imported"):
        spec_model()
    with pytest.raises(EnvError, match=r"of slim-noise 1\.2 cannot be imported"):
        recipe_json_schema()


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (SimpleNamespace(), "has no attribute Config that is a ProcessorConfig"),
        (SimpleNamespace(Config=dict), "has no attribute Config that is a ProcessorConfig"),
        (SimpleNamespace(Config=ProcessorConfig), r"has a Config whose field type is not Literal\['nois'\]"),
        (SimpleNamespace(Config=NoiseConfig), r"has a Config whose field type is not Literal\['nois'\]"),
    ],
)
def test_a_class_that_is_no_processor(add, loaded, message):
    add("nois", loaded)
    with pytest.raises(EnvError, match=f"the processor 'nois' of slim-noise 1.2 {message}"):
        spec_of({"type": "nois"})


def test_two_packages_with_the_same_name(add, install):
    add("noise", SimpleNamespace(Config=NoiseConfig), value="a:A")
    point = add("noise", SimpleNamespace(Config=NoiseConfig), value="b:B")
    point.package = "slim-hiss"
    with pytest.raises(EnvError, match=r"is provided by slim-noise 1.2 and slim-hiss 1.2 \(uninstall all but one"):
        spec_of({"type": "noise"})


def test_one_package_seen_twice_is_one_package(add):
    add("noise", SimpleNamespace(Config=NoiseConfig), value="a:A")
    add("noise", SimpleNamespace(Config=NoiseConfig), value="a:A")
    assert spec_of({"type": "noise"})
