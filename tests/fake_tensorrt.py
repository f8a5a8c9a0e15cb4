"""A fake `tensorrt` of a given version: what that version's Python bindings have, and nothing else.

``tests/data/tensorrt/<version>.json`` lists classes, members with their signatures, and enum values, read off the real
bindings and trimmed to what builds, runs and inspects an engine. Whatever is not listed raises AttributeError, whatever
does not fit a signature TypeError, as pybind11 does. Severities are the fake's own: their numbers never changed.

    lib = fake("10.3.0")
    lib.script["Builder.build_serialized_network"] = None  # or a function of (self, *arguments), or a property's value
    ...
    lib.called("IBuilderConfig.set_flag")  # [(BuilderFlag.TF32,), ...]
    lib.layers(("conv1", "CONVOLUTION", True), ...)  # for a network on DLA

A build calls the calibrator that its configuration has as TensorRT does.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

SURFACES = Path(__file__).parent / "data" / "tensorrt"
VERSIONS = ["8.6.1", "10.0.1", "10.3.0", "10.8.0.43", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106"]
VERSIONS += ["rtx-1.7.1.116"]

OVERLOADED = {  # pybind11 shows these as (*args, **kwargs); one of their forms
    "Builder.build_serialized_network": "(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory",
    "Dims.__init__": "(self, shape: tuple = ()) -> None",
    "ICudaEngine.create_execution_context": "(self, runtime_config: object = None) -> IExecutionContext",
    "IExecutionContext.set_input_shape": "(self, name: str, shape: Dims) -> bool",
    "Runtime.deserialize_cuda_engine": "(self, serialized_engine: Buffer) -> ICudaEngine",
}
SHAPES = {"input": (-1, 3, 64, 64), "output": (-1, 10)}
PROPERTIES = {
    "Builder.num_DLA_cores": 0,
    "IBuilderConfig.num_optimization_profiles": 0,
    "ICudaEngine.num_io_tensors": 2,
    "ICudaEngine.num_optimization_profiles": 1,
    "IHostMemory.nbytes": 4,
    "INetworkDefinition.num_inputs": 1,
    "INetworkDefinition.num_layers": 0,
    "ITensor.dtype": lambda tensor: tensor.lib.DataType.FLOAT,
    "ITensor.name": "input",
    "ITensor.shape": SHAPES["input"],
    "OnnxParser.num_errors": 0,
}


class Severity(enum.Enum):
    """``ILogger.Severity``."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __int__(self) -> int:
        return int(self.value)


class Meta(type):
    """Like pybind11's: a subclass must call the constructor of its base."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        if not instance.__dict__.get("_made"):
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return instance


class Fake(metaclass=Meta):
    """An object of the library: members of the surface only, unless a test's or edgeres' own subclass adds some."""

    lib: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self).__dict__.get("_surface") and not isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        super().__setattr__(name, value)

    def __bytes__(self) -> bytes:
        return b"plan"


class Library(ModuleType):
    """The fake module, with what tests look at."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(name)
        self.__version__ = version
        self.script: dict[str, Any] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.used: list[Any] = []  # loggers that something was made with; the library keeps to the first

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of each call of ``Class.method`` in the order of its parameters, defaults included."""
        return [args for called, args in self.calls if called == name]

    def set_to(self, name: str) -> Any:
        """What ``Class.property`` was set to last."""
        return self.called(f"{name}=")[-1][0]

    def flags(self) -> set[str]:
        """Builder flags as they ended up. TF32 is on by itself."""
        on = {"TF32"}
        for name, args in self.calls:
            if name == "IBuilderConfig.set_flag":
                on.add(args[0].name)
            if name == "IBuilderConfig.clear_flag":
                on.discard(args[0].name)
        return on

    def asked(self) -> set[str]:
        """`flags` but for the one that every build with TensorRT-RTX sets."""
        return self.flags() - {"REQUIRE_USER_ALLOCATION"}

    def say(self, severity: str, message: str) -> None:
        """What TensorRT does when it has something to tell."""
        self.used[0].log(Severity[severity], message)

    def layers(self, *layers: tuple[str, str, bool]) -> None:
        """Give the network layers: name, member of LayerType, and whether DLA runs it."""
        made = []
        for name, kind, dla in layers:
            layer = self.make("ILayer")
            layer.__dict__.update({"=ILayer.name": name, "=ILayer.type": getattr(self.LayerType, kind), "dla": dla})
            made.append(layer)
        self.script["INetworkDefinition.num_layers"] = len(made)
        self.script["INetworkDefinition.get_layer"] = lambda self, index: made[index]
        self.script["IBuilderConfig.can_run_on_DLA"] = lambda self, layer: layer.__dict__["dla"]

    def make(self, name: str) -> Any:
        """An object that the library itself makes."""
        instance = object.__new__(getattr(self, name))
        instance.__dict__["_made"] = True
        return instance


def fake(version: str, without: tuple[str, ...] = ()) -> Any:
    """The fake of ``version`` (a name in `VERSIONS`), lacking ``without`` ("Class" or "Class.member") besides."""
    rtx = version.startswith("rtx-")
    lib = Library("tensorrt_rtx" if rtx else "tensorrt", version.removeprefix("rtx-"))
    for name, members in _surface(version).items():
        if name in without:
            continue
        if all(isinstance(value, int) for value in members.values()):
            kind: Any = enum.Enum(name, members)
            kind.__int__ = lambda self: self.value
        else:
            kept = {m: s for m, s in members.items() if f"{name}.{m}" not in without}
            space = {member: _member(lib, f"{name}.{member}", text) for member, text in kept.items()}
            kind = Meta(name, (Fake,), {**space, "_surface": True, "lib": lib})
        setattr(lib, name, kind)
    lib.ILogger.Severity = Severity
    for severity in Severity:
        setattr(lib.ILogger, severity.name, severity)
    return lib


@cache
def _surface(version: str) -> dict[str, dict[str, Any]]:
    return json.loads((SURFACES / f"{version}.json").read_text(encoding="utf-8"))


def _member(lib: Library, name: str, text: str) -> Any:
    if text == "property":
        return property(lambda self: _get(lib, self, name), lambda self, value: _set(lib, self, name, value))
    if text == "none":

        def refuse(self: Any) -> None:
            raise TypeError(f"{name.split('.')[0]}: No constructor defined!")

        return refuse
    signature, types, returns = _signature(OVERLOADED.get(name, text) if text.startswith("(*args") else text)

    def method(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self, *rest = bound.args
        for value, wanted in zip(rest, types, strict=False):
            _check(lib, name, value, wanted)
        lib.calls.append((name, tuple(rest)))
        if name.endswith(".__init__"):
            self.__dict__["_made"] = True
            lib.used += [value for value in rest if isinstance(value, lib.ILogger)]
        if name in lib.script:
            script = lib.script[name]
            return script(self, *rest) if callable(script) else script
        if name in HABITS:
            return HABITS[name](self, *rest)
        return _plausible(lib, returns)

    return method


def _get(lib: Library, self: Any, name: str) -> Any:
    if name in lib.script:
        script = lib.script[name]
        return script(self) if callable(script) else script
    usual = PROPERTIES.get(name)
    return self.__dict__.get(f"={name}", usual(self) if callable(usual) else usual)


def _set(lib: Library, self: Any, name: str, value: Any) -> None:
    lib.calls.append((f"{name}=", (value,)))
    self.__dict__[f"={name}"] = value


def _signature(text: str) -> tuple[inspect.Signature, list[str], str]:
    """A signature as pybind11 writes it -> as Python has it, types of the arguments after self, type returned."""
    arguments, _, returns = text.partition(") -> ")
    parameters, types = [], []
    for part in re.split(r", (?![^\[]*\])", arguments.removeprefix("(").removesuffix(")")):  # not inside of tuple[a, b]
        declared, has_default, default = part.partition(" = ")
        name, _, kind = declared.partition(": ")
        how = inspect.Parameter.POSITIONAL_OR_KEYWORD
        if name.startswith("*"):
            how = inspect.Parameter.VAR_KEYWORD if name.startswith("**") else inspect.Parameter.VAR_POSITIONAL
        elif re.fullmatch(r"self|arg\d+", name):
            how = inspect.Parameter.POSITIONAL_ONLY
        given = _default(default) if has_default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name.lstrip("*"), how, default=given))
        types.append(kind)
    return inspect.Signature(parameters), types[1:], returns


def _default(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return {"True": True, "False": False, "()": ()}.get(text)


def _check(lib: Library, name: str, value: Any, wanted: str) -> None:
    """Raise TypeError unless ``value`` may be passed where ``wanted`` is."""
    simple = {"str": str, "bool": bool}
    if wanted == "Dims":
        fits = all(isinstance(n, int) for n in tuple(value))
    elif wanted == "int":
        fits = isinstance(value, int)
    elif wanted == "Buffer":
        fits = isinstance(value, bytes | bytearray | memoryview | lib.IHostMemory)
    elif wanted in simple:
        fits = value is None or isinstance(value, simple[wanted])
    elif kind := getattr(lib, wanted, None):
        fits = value is None or isinstance(value, kind)
    else:
        fits = True
    if not fits:
        raise TypeError(f"{name}(): incompatible function arguments: {value!r} is no {wanted}")


def _plausible(lib: Library, returns: str) -> Any:
    """What a call that went well returns, by its type."""
    if (kind := getattr(lib, returns, None)) is not None:
        return next(iter(kind)) if issubclass(kind, enum.Enum) else lib.make(returns)
    values = {"bool": True, "int": 0, "str": "", "float": 0.0, "Buffer": b"", "Dims": ()}
    return [] if returns.startswith("list[") else values.get(returns)


def header(lib: Any, algorithm: str) -> str:
    """First line of a calibration cache that ``lib`` takes."""
    major, minor, patch = map(int, lib.__version__.split(".")[:3])
    return f"TRT-{(major * 100 + minor) * 100 + patch if major > 9 else major * 1000 + minor * 100 + patch}-{algorithm}"


def calibrate(lib: Any, calibrator: Any) -> bool:
    """Use a calibrator as TensorRT does: its cache if that fits, else batches until there are none -> any scales?

    An exception in there ends the batches, and nobody hears of it. A test may look at each batch:
    ``lib.script["batch"]`` gets its addresses, or says by False that there are enough.
    """
    entropy = isinstance(calibrator, lib.IInt8EntropyCalibrator2)
    head = header(lib, "EntropyCalibration2" if entropy else "MinMaxCalibration").encode()
    given = calibrator.read_calibration_cache()
    if given is not None and bytes(given).partition(b"\n")[0] == head:
        calibrator.write_calibration_cache(memoryview(given))
        return True
    batches = 0
    while addresses := _swallow(calibrator.get_batch, ["input"]):
        batches += 1
        if lib.script.get("batch", lambda addresses: True)(addresses) is False:
            break
    if batches:
        calibrator.write_calibration_cache(memoryview(head + b"\ninput: 3c000000\n"))
    else:
        lib.say("ERROR", "Calibration failure occurred with no scaling factors detected.")
    return batches > 0


def _swallow(call: Any, *args: Any) -> Any:
    try:
        return call(*args)
    except Exception:
        return None


def _build(builder: Any, network: Any, config: Any) -> Any:
    """A build of three steps; None where the progress monitor ends it, or calibration fails."""
    lib = builder.lib
    calibrator = getattr(config, "int8_calibrator", None)
    if calibrator is not None and not calibrate(lib, calibrator):
        return None
    if monitor := getattr(config, "progress_monitor", None):
        monitor.phase_start("Building", None, 3)
        for step in range(3):
            if not monitor.step_complete("Building", step):
                return None
        monitor.phase_finish("Building")
    return lib.make("IHostMemory")


def _add_profile(config: Any, profile: Any) -> int:
    config.__dict__["=IBuilderConfig.num_optimization_profiles"] = 1
    return 0


def _keep(name: str) -> Any:
    """A setter whose value `_kept` returns again, by the arguments before it."""

    def keep(self: Any, *args: Any) -> bool:
        self.__dict__.setdefault(f"kept {name}", {})[args[:-1]] = args[-1]
        return True

    return keep


def _kept(name: str, default: Any) -> Any:
    return lambda self, *args: self.__dict__.get(f"kept {name}", {}).get(args, default(self, *args))


def _io_mode(engine: Any, name: str) -> Any:
    return engine.lib.TensorIOMode.INPUT if name == "input" else engine.lib.TensorIOMode.OUTPUT


def _context_shape(context: Any, name: str) -> tuple[int, ...]:
    """The engine's shape, with the batch that was set."""
    batch = context.__dict__.get("kept shape", {}).get(("input",), SHAPES["input"])[0]
    return (batch, *SHAPES[name][1:])


def _context(engine: Any, *config: Any) -> Any:
    context = engine.lib.make("IExecutionContext")
    context.__dict__["=IExecutionContext.engine"] = engine
    return context


HABITS = {
    "Builder.build_serialized_network": _build,
    "IBuilderConfig.add_optimization_profile": _add_profile,
    "IBuilderConfig.set_memory_pool_limit": _keep("pool"),
    "IBuilderConfig.get_memory_pool_limit": _kept("pool", lambda self, pool: 8 << 30),
    "ParserError.node": lambda self: -1,
    "ICudaEngine.create_execution_context": _context,
    "ICudaEngine.get_tensor_name": lambda self, index: list(SHAPES)[index],
    "ICudaEngine.get_tensor_mode": _io_mode,
    "ICudaEngine.get_tensor_dtype": lambda self, name: self.lib.DataType.FLOAT,
    "ICudaEngine.get_tensor_shape": lambda self, name: SHAPES[name],
    "ICudaEngine.get_tensor_profile_shape": lambda self, name, index: [(n, *SHAPES[name][1:]) for n in (1, 8, 32)],
    "IExecutionContext.set_input_shape": _keep("shape"),
    "IExecutionContext.get_tensor_shape": _context_shape,
    "IExecutionContext.set_tensor_address": _keep("address"),
    "IExecutionContext.get_tensor_address": _kept("address", lambda self, name: 0),
    "EngineInspector.get_engine_information": lambda self, form: '{"Layers": []}',
}
"""Class.method -> what it does, where its return type alone does not say."""
