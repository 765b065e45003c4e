"""Refuses a Python or a torch that is too old. Imported before anything that needs newer ones."""

import platform

OLDEST = {"Python": (3, 11), "torch": (2, 10)}  # torch: the first with the stable ABI that we use


def _check(name, found):  # type: ignore[no-untyped-def]  # old Pythons must read this file
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST[name]:
        oldest = ".".join(str(part) for part in OLDEST[name])
        raise ImportError(f"hgc_kernels needs {name} >= {oldest}, and this is {name} {found}")


_check("Python", platform.python_version())

import torch  # noqa: E402

_check("torch", torch.__version__)
