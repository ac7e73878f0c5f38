"""What registration asks of ONNX Runtime, in tables of its interface that are made here and write down what is called."""

from __future__ import annotations

import concurrent.futures
import ctypes

import pytest
from runtime_layers import LIBRARY

CREATE_DOMAIN, ADD_OPERATOR, ADD_DOMAIN, PROVIDERS, RELEASE_PROVIDERS = 26, 27, 28, 125, 126
SLOTS = 300
CPU, GPU_INTERFACE = 17, 18
POINTER = ctypes.c_void_p
CALL_2 = ctypes.CFUNCTYPE(POINTER, POINTER, POINTER)
GET_API = ctypes.CFUNCTYPE(POINTER, ctypes.c_uint32)
GET_VERSION = ctypes.CFUNCTYPE(POINTER)
KEPT: list[object] = []
"""libclaq remembers a table by its address, which may not become another one's."""


class Base(ctypes.Structure):
    """OrtApiBase."""

    _fields_ = (("get_api", GET_API), ("get_version", GET_VERSION))


class Runtime:
    """An ONNX Runtime of that version, which has the CPU provider alone."""

    def __init__(self, version: str) -> None:
        self.asked: list[int] = []
        self.domains: list[int] = []
        self.operators = 0
        self.added: list[int] = []
        names = (ctypes.c_char_p * 1)(b"CPUExecutionProvider")
        text = ctypes.create_string_buffer(version.encode())

        def create_domain(_name: int, out: int) -> None:
            self.domains.append(1000 + len(self.domains))
            POINTER.from_address(out).value = self.domains[-1]

        def add_operator(_domain: int, _operator: int) -> None:
            self.operators += 1

        def add_domain(_options: int, domain: int) -> None:
            self.added.append(domain)

        def providers(out: int, count: int) -> None:
            POINTER.from_address(out).value = ctypes.addressof(names)
            ctypes.c_int.from_address(count).value = 1

        def release_providers(_names: int, _count: int) -> None:
            pass

        def get_api(asked: int) -> int | None:
            self.asked.append(asked)
            return ctypes.addressof(table) if asked <= int(version.split(".")[1]) else None

        table = (POINTER * SLOTS)()
        calls = {
            CREATE_DOMAIN: create_domain,
            ADD_OPERATOR: add_operator,
            ADD_DOMAIN: add_domain,
            PROVIDERS: providers,
            RELEASE_PROVIDERS: release_providers,
        }
        functions = {slot: CALL_2(call) for slot, call in calls.items()}
        for slot, function in functions.items():
            table[slot] = ctypes.cast(function, POINTER)
        self.base = Base(GET_API(get_api), GET_VERSION(lambda: ctypes.addressof(text)))
        KEPT.extend([self, table, names, text, functions])

    def register(self) -> None:
        register = LIBRARY.RegisterCustomOps
        register.restype = POINTER
        assert register(POINTER(1), ctypes.byref(self.base)) is None


@pytest.mark.parametrize(("version", "asks"), [("1.17.3", False), ("1.18.0", True), ("1.31.1", True)])
def test_only_a_version_that_it_has_is_asked_for(version: str, asks: bool) -> None:
    runtime = Runtime(version)
    runtime.register()
    assert (GPU_INTERFACE in runtime.asked) == asks
    assert set(runtime.asked) <= {CPU, GPU_INTERFACE}


def test_a_process_has_one_domain_for_each_onnx_runtime() -> None:
    first, second = Runtime("1.31.1"), Runtime("1.31.1")
    for runtime in (first, second, first):
        runtime.register()
    operators = first.operators
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(runtime.register) for runtime in (first, second) * 10]:
            future.result()
    assert len(first.domains) == len(second.domains) == 1
    assert first.operators == second.operators == operators > 0
    assert first.added == first.domains * 12
    assert second.added == second.domains * 11
