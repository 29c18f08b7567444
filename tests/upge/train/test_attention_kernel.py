"""Which attention kernel runs, with stand-ins for a Hopper GPU and for FlashAttention 3."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import _registry

from upge.train.packed_attention import choose_kernel, kernel_name

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hopper GPU with FlashAttention 3, which notes that it was activated."""
    calls: list[str] = []
    find = importlib.util.find_spec

    def register() -> SimpleNamespace:
        calls.append("FA3")
        return SimpleNamespace(remove=lambda: None)

    def spec(name: str, *arguments: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name == "flash_attn_interface" else find(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", None)
    yield calls


def test_flash_attention_3_on_hopper(activated: list[str]) -> None:
    assert kernel_name(CUDA, "bfloat16", 256) == "variable-length kernel, FA2"
    choose_kernel(CUDA)
    choose_kernel(CUDA)
    assert activated == ["FA3"] and attention.current_flash_attention_impl() == "FA3"
    assert kernel_name(CUDA, "bfloat16", 256) == "variable-length kernel, FA3"
    assert kernel_name(CUDA, "float32", 64) == kernel_name(CPU, "bfloat16", 64) == "loop of SDPA"
    assert kernel_name(CUDA, "bfloat16", 257) == "loop of SDPA"


def test_not_on_other_devices_nor_without_the_package(activated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernel(CPU)
    with monkeypatch.context() as other:
        other.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        choose_kernel(CUDA)
    with monkeypatch.context() as other:
        other.setattr(importlib.util, "find_spec", lambda name: None)
        choose_kernel(CUDA)
    with monkeypatch.context() as other:
        other.delitem(_registry._FLASH_ATTENTION_IMPLS, "FA3")
        choose_kernel(CUDA)
    with monkeypatch.context() as other:
        other.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", ("FA4", None))
        choose_kernel(CUDA)
        assert kernel_name(CUDA, "bfloat16", 256) == "variable-length kernel, FA4"
    assert not activated


def test_an_installation_that_does_not_load_is_a_warning(activated: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", broken)
    with pytest.warns(UserWarning, match="FlashAttention 3 is installed but cannot be used: undefined symbol"):
        choose_kernel(CUDA)
    assert kernel_name(CUDA, "bfloat16", 256) == "variable-length kernel, FA2"


def test_the_interface_of_torch() -> None:
    """The stand-in above replaces what this torch has."""
    import inspect

    from torch.nn.attention import _fa3

    assert "FA3" in attention.list_flash_attention_impls()
    register = inspect.signature(_fa3.register_flash_attention_fa3)
    assert register.parameters["module_path"].default == "flash_attn_interface"
