"""Something that is to happen once a module has been imported, which nobody need wait for."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call `then` once the module has run: now, if it has, else as the last part of its import, whoever imports it.

    Args:
        name: Dotted name of a module inside a package.
        then: May import that module, and what that has imported. What imports it is still half-way then: other
            modules of its package need not be whole.
    """
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watcher(name, then))


class _Watcher(MetaPathFinder, Loader):
    """Finds one module as Python does, and has it loaded by the loader that Python finds."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then
        self.loader: Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.name else None
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which knows nothing of this, then what was to happen."""
        assert module.__spec__ is not None and self.loader is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path.remove(self)
        self.then()
