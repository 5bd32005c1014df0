"""Compiled graphs on disk: made once per machine, loaded in milliseconds by every later process.

A graph is compiled ahead of time (AOTInductor) into one library, which is a folder under the user's cache beside how
its constants follow from the model's weights (``graphs.constants``). The folder's name is a digest of everything that
the code depends on: the model's structure, source and the plain values in its modules, configuration, dtypes, devices,
attention; what the pass is; threads, processor and accelerator; versions. Weights are not among it, unless some were
folded into other values.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.graphs.buffers import PassShape
from specdec.graphs.constants import Weights, explain, recorder
from specdec.graphs.state import code_of, foreign_hook, settings, sources

Graph = Callable[[list[Tensor]], list[Tensor]]

_LIBRARY, _RECIPES, _KEPT = "graph.pt2", "constants.json", "constants.pt"
_REFUSED = ".refused"


def folder() -> Path:
    """Where compiled graphs lie: ``$SPECDEC_CACHE``, else ``specdec`` in the user's cache folder."""
    given = os.environ.get("SPECDEC_CACHE")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"
    return base / "graphs"


def identity(model: Any, kinds: list[str] | None) -> str | None:
    """Digest of what the code of a model's graphs depends on; None where a hook makes that unknowable.

    Args:
        model: the target.
        kinds: kinds of attention in the order of the masks.
    """
    state = hashlib.blake2b(digest_size=16)
    if foreign_hook(model) is not None or any("forward" in module.__dict__ for module in model.modules()):
        return None
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        state.update(f"{name} {tuple(value.shape)} {value.dtype} {value.device} {value.stride()}\n".encode())
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    parts = [repr(model), json.dumps(config, sort_keys=True, default=str), str(attention), str(kinds), settings(model)]
    for part in (*parts, *_code(model), *_machine(), *_ours()):
        state.update(part.encode())
        state.update(b"\0")
    return state.hexdigest()


def _code(model: nn.Module) -> Iterator[str]:
    """What every class among the modules computes: the code of its forward, and the files they are in."""
    kinds = {inspect.unwrap(type(module).forward) for module in model.modules()}
    found = {forward: forward.__code__ for forward in kinds if hasattr(forward, "__code__")}
    for forward in sorted(found, key=lambda forward: (found[forward].co_filename, found[forward].co_firstlineno)):
        yield from code_of(forward)
    for file in sorted({code.co_filename for code in found.values()}):
        if Path(file).is_file():
            yield from sources(Path(file))


@cache
def _machine() -> tuple[str, ...]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    import transformers

    accelerator = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = (torch.__version__, transformers.__version__, str(torch.version.cuda), platform.python_version())
    return (*known, platform.machine(), platform.processor(), *accelerator, *versions)


@cache
def _ours() -> tuple[str, ...]:
    core = Path(__file__).resolve().parent
    return (*sources(core), *sources(core.parent))  # routing, visibility, trees: what is traced in, and what calls it


class Store:
    """The graphs of one model.

    Args:
        known: ``identity`` of the model; None keeps nothing.
        weights: of the traced module.
    """

    def __init__(self, known: str | None, weights: Weights) -> None:
        self.known, self.weights = known, weights

    def _place(self, shape: PassShape) -> Path | None:
        """Folder of a graph that serves any weights; with ``-digest`` behind its name, one that serves these."""
        if self.known is None:
            return None
        route = shape.route
        what = (shape.batch, shape.nodes, route.lo, route.hi, sorted(route.skip_attention), sorted(route.skip_mlp))
        how = (shape.attention, shape.words, shape.cache, shape.autocast, torch.get_num_threads())
        parts = (self.known, *what, route.logits, shape.taps, *how)
        return folder() / hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def load(self, shape: PassShape) -> Graph | None:
        """The graph of these passes, where it has been made before; one that cannot be read is thrown away."""
        place = self._place(shape)
        if place is None or not place.parent.is_dir():
            return None
        if not place.is_dir():
            if not any(place.parent.glob(f"{place.name}-*")):
                return None
            place = place.with_name(f"{place.name}-{self.weights.digest}")
        if not place.is_dir():
            return None
        try:
            return _open(place, self.weights)
        except (RuntimeError, OSError, ValueError, KeyError, AssertionError, pickle.UnpicklingError):
            shutil.rmtree(place, ignore_errors=True)
            return None

    def refuse(self, shape: PassShape) -> None:
        """Remember, for other processes too, that these passes cannot be traced."""
        place = self._place(shape)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_suffix(_REFUSED).touch()

    def is_refused(self, shape: PassShape) -> bool:
        """Whether a process has found that these passes cannot be traced."""
        place = self._place(shape)
        return place is not None and place.with_suffix(_REFUSED).is_file()

    def compile(self, shape: PassShape, program: torch.export.ExportedProgram) -> Graph:
        """Make the graph of these passes, and keep it for the next process where it is the model's own.

        Raises:
            Exception: whatever the compiler throws.
        """
        place = self._place(shape)
        root = Path(tempfile.gettempdir()) if place is None else place.parent
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
        try:
            kept = _make(work, program, self.weights)
            graph = _open(work, self.weights)
            if place is not None:
                place = place.with_name(f"{place.name}-{self.weights.digest}") if kept else place
                if not place.exists():  # a rename is atomic; where another process was quicker, its graph is as good
                    work.rename(place)
            return graph
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _make(work: Path, program: torch.export.ExportedProgram, weights: Weights) -> bool:
    """Compile into a folder; returns whether constants are kept by value."""
    import torch._inductor as inductor

    on_cpu = all(value.device.type == "cpu" for value in weights.named.values())
    constants: dict[str, Tensor] = {}
    options = {
        "freezing": on_cpu,
        "post_grad_custom_pre_pass": recorder(constants),
        "aot_inductor.package_constants_in_so": False,
        # The wrapper only calls kernels and takes most of the compiler's time when it is optimised.
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    library = work / _LIBRARY
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the compiler's own deprecations
        inductor.aoti_compile_and_package(program, package_path=str(library), inductor_configs=options)
    wanted = _loader(library).get_constant_fqns()
    recipes, kept = explain(constants, wanted, weights.named)
    if kept:
        torch.save(kept, work / _KEPT)
    (work / _RECIPES).write_text(json.dumps(recipes), encoding="utf-8")
    return bool(kept)


def _open(place: Path, weights: Weights) -> Graph:
    recipes = json.loads((place / _RECIPES).read_text(encoding="utf-8"))
    kept = torch.load(place / _KEPT, weights_only=True) if (place / _KEPT).is_file() else {}
    device = next(iter(weights.named.values())).device
    loader, constants = _loader(place / _LIBRARY, device.index), weights.made(recipes, kept)
    loader.load_constants(constants, False, False, True)  # neither copied nor owned: they stay ours

    def run(tensors: list[Tensor], held: Any = constants) -> list[Tensor]:  # noqa: ARG001 - held as long as the graph
        return loader.boxed_run(list(tensors))

    return run


def _loader(library: Path, device: int | None = None) -> Any:
    # What torch._inductor.aoti_load_package wraps; importing that package takes seconds, this none.
    return torch._C._aoti.AOTIModelPackageLoader(str(library), "model", False, 1, -1 if device is None else device)
