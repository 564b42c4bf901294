"""Taps of attentions: only where they were asked for, gone afterwards, and none of the business of others."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import pytest
import torch

from slim_llm.models.attention import Attentions


def test_only_the_named_attentions_are_tapped(tiny: ModuleType) -> None:
    model = tiny.family("llama")
    attentions = Attentions(model)
    seen: list[Any] = []
    with attentions.tapped({"model.layers.1.self_attn": lambda *states: seen.append(states)}):
        tiny.run(model, tiny.tokens())
    assert len(seen) == 1
    before = tiny.hooks(model)
    with attentions.tapped({}):
        assert tiny.hooks(model) == before


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_nothing_stays_after_an_error(tiny: ModuleType, name: str) -> None:
    model = tiny.family(name)
    attentions = Attentions(model)
    before, ids = tiny.hooks(model), tiny.tokens()
    plain = tiny.run(model, ids)

    def broken(*_states: Any) -> None:
        raise ValueError("broken tap")

    with pytest.raises(ValueError, match="broken tap"), attentions.tapped({attentions.attentions[1].name: broken}):
        tiny.run(model, ids)
    assert tiny.hooks(model) == before
    with pytest.raises(KeyError), attentions.tapped({attentions.attentions[0].name: broken, "no.such": broken}):
        pass
    assert tiny.hooks(model) == before
    assert torch.equal(tiny.run(model, ids), plain)


def test_threads_do_not_disturb_each_other(tiny: ModuleType) -> None:
    """Two models are tapped at once, entering and leaving in the other's middle; a third is not tapped at all."""
    models = [tiny.family("llama"), tiny.family("qwen3")]
    before = [tiny.hooks(model) for model in models]
    expected = [tiny.observe(model, tiny.tokens())[0] for model in models]
    found: list[Any] = [None, None]
    barrier = threading.Barrier(2, timeout=60)
    left = threading.Event()

    def work(index: int) -> None:
        model = models[index]
        attentions = Attentions(model)
        seen: dict[str, list[Any]] = {info.name: [] for info in attentions.attentions}
        if index == 1:
            barrier.wait()
        with attentions.tapped({n: lambda *states, n=n: seen[n].append(states) for n in seen}):
            if index == 0:
                barrier.wait()
            barrier.wait()
            if index == 1:
                left.wait(60)
            tiny.run(model, tiny.tokens())
            found[index] = seen
        left.set()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for name, states in expected[index].items():
            for one, other in zip(found[index][name][0], states[0], strict=True):
                assert torch.equal(one, other)
    assert [tiny.hooks(model) for model in models] == before


def test_samples_that_stand_in_the_middle_of_the_model_are_not_confused(tiny: ModuleType) -> None:
    """The suspended forward runs blocks from the outside while other samples stand in the middle of the model."""
    from slim_core.model.suspended import SuspendedForward

    model = tiny.family("llama")
    attentions = Attentions(model)
    ids = [tiny.tokens(seed, batch=1, length=5 + seed) for seed in range(3)]
    expected = [tiny.observe(model, each)[0] for each in ids]
    inputs = [{"input_ids": each, "use_cache": False} for each in ids]
    with torch.no_grad(), SuspendedForward(model, list(model.model.layers), inputs) as forward:
        forward.start()
        for block in range(3):
            name = f"model.layers.{block}.self_attn"
            seen: list[Any] = []
            with attentions.tapped({name: lambda *states, seen=seen: seen.append(states)}):
                for sample in range(3):
                    forward.resume(sample, forward.compute(forward.call(sample)))
            for sample in range(3):
                for one, other in zip(seen[sample], expected[sample][name][0], strict=True):
                    assert torch.equal(one, other)
