"""What a Python that `h2keep run` leads to runs as it starts: it waits for httpx and httpx2, and installs h2keep there.

The directory of this file is first on PYTHONPATH, so child processes run it too. It imports nothing that isn't there
already, and whatever goes wrong in it is one line on standard error. The next `sitecustomize` on the path then has its
turn, and from there on all is as without this one.
"""

from __future__ import annotations

import os
import sys

# As typing has it, which isn't imported here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_LIBRARIES = ("httpx", "httpx2")


class _Finder:
    """Finds the two libraries where others find them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """MetaPathFinder."""
        if name not in _LIBRARIES:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is not self and find_spec is not None:
                spec: ModuleSpec | None = find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                    return spec
        return None


class _Loader:
    """Loads as the loader that it stands for, installs h2keep into what was loaded, and leaves no trace of itself."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        """Loader."""
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _install_into(module)


def _install_into(module: ModuleType) -> None:
    try:
        from h2keep._install import install_from_environment

        install_from_environment(module)
    except Exception as error:  # noqa: BLE001
        _complain(module.__name__ + " is used as it is, without PINGs", error)


def _complain(what: str, error: Exception) -> None:
    if sys.stderr is not None:
        reason = " ".join(str(error).split())
        sys.stderr.write("h2keep: {}: {}: {}\n".format(what, type(error).__name__, reason))  # noqa: UP032


def _begin() -> None:
    try:
        sys.meta_path.insert(0, _Finder())
        for name in _LIBRARIES:
            if name in sys.modules:
                # A .pth file was quicker.
                _install_into(sys.modules[name])
    except Exception as error:  # noqa: BLE001
        _complain("this program runs as it is, without PINGs", error)


def _make_way() -> None:
    """Let the next sitecustomize on the path be the one; its errors are its own."""
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != own]
    this = sys.modules.pop(__name__, None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if this is not None:
            # There is no other, and who imports this one wants to find it.
            sys.modules[__name__] = this


if __name__ == "sitecustomize":
    _begin()
    _make_way()
