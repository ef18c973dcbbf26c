"""NVIDIA's driver through cuda-bindings: every call of `Driver`, checked, nothing added.

The module `cuda.bindings.driver` is handed in, so nothing here imports it. A kernel launch costs
well under a microsecond of host time: the argument block was packed when the launch was made.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from runtime.ops.errors import BackendError, MemoryLimitError

from .arena import sized
from .arguments import WIDTHS
from .catalogue import Compiled
from .driver import DeviceInfo, DeviceLostError, Driver

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
# errors after which a context can do nothing any more
_LOST = frozenset(
    "CUDA_ERROR_" + name
    for name in (
        "ASSERT",
        "CONTAINED",
        "CONTEXT_IS_DESTROYED",
        "DEINITIALIZED",
        "DEVICE_UNAVAILABLE",
        "ECC_UNCORRECTABLE",
        "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
        "NVLINK_UNCORRECTABLE",
        "TENSOR_MEMORY_LEAK",
        "UNKNOWN",
    )
)


class BoundDriver(Driver):
    """`Driver` by the functions of `cuda.bindings.driver`, given as `api`."""

    fake = False

    def __init__(self, api: Any) -> None:
        self._api = api
        self._names: dict[int, str] = {}  # of the contexts' GPUs
        self._current = threading.local()
        self._lost: dict[str, str] = {}  # GPU -> the error that ended it
        self._configurations: dict[tuple[int, int], Any] = {}

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """A driver function's result. BackendError, or MemoryLimitError, names the function."""
        if self._lost:
            self._check_lost()
        code, *values = getattr(self._api, name)(*arguments)
        if int(code):
            self._fail(name, code, what)
        return values[0] if len(values) == 1 else tuple(values)

    def _fail(self, name: str, code: Any, what: str = "") -> NoReturn:
        if code != self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            said = f"{name} failed: {self._error(code)}"
            if getattr(code, "name", "") in _LOST and (gpu := self._here()):
                self._lost.setdefault(gpu, said)
                self._check_lost()
            raise BackendError(said)
        free, total = self.memory_info()
        raise MemoryLimitError(
            f"the GPU has no room{what or ' (' + name + ')'}: {sized(free)} of {sized(total)} are "
            "free; use a shorter context, a smaller kv_type or more devices"
        )

    def _here(self) -> str:
        """The GPU whose context is current in this thread, or ""."""
        return getattr(self._current, "name", "")

    def _check_lost(self) -> None:
        if error := self._lost.get(self._here()):
            raise DeviceLostError(
                f"{self._here()} is lost: {error}; close the model and load it again, which "
                "starts from an empty context"
            )

    def _error(self, code: Any) -> str:
        name = getattr(code, "name", str(code))
        try:
            text = self._api.cuGetErrorString(code)[1]
            return f"{name} ({text.decode()})" if text else name
        except (AttributeError, RuntimeError):
            return name

    def initialize(self) -> None:
        """Before any other call but `version`."""
        self._call("cuInit", 0)

    def version(self) -> int:
        return self._call("cuDriverGetVersion")

    def device_count(self) -> int:
        return self._call("cuDeviceGetCount")

    def device_info(self, index: int) -> DeviceInfo:
        device = self._call("cuDeviceGet", index)
        names = self._api.CUdevice_attribute

        def attribute(name: str) -> int:
            key = getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}")
            return self._call("cuDeviceGetAttribute", key, device)

        return DeviceInfo(
            index,
            self._call("cuDeviceGetName", 128, device).partition(b"\0")[0].decode(),
            (attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
            self._call("cuDeviceTotalMem", device),
            attribute("MULTIPROCESSOR_COUNT"),
            attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            attribute("L2_CACHE_SIZE"),
            attribute("CLOCK_RATE"),
        )

    def retain_context(self, index: int) -> Any:
        device = self._call("cuDeviceGet", index)
        context = self._call("cuDevicePrimaryCtxRetain", device)
        name = self._call("cuDeviceGetName", 128, device).partition(b"\0")[0].decode()
        self._names[int(context)] = f"cuda:{index} ({name})"
        return context

    def release_context(self, index: int) -> None:
        self._current.name = ""  # also where the GPU is lost
        self._call("cuDevicePrimaryCtxRelease", self._call("cuDeviceGet", index))

    def use_context(self, context: Any) -> None:
        self._current.name = self._names.get(int(context), "")
        self._call("cuCtxSetCurrent", context)

    def can_reach(self, index: int, other: int) -> bool:
        devices = [self._call("cuDeviceGet", n) for n in (index, other)]
        return bool(self._call("cuDeviceCanAccessPeer", *devices))

    def reach(self, context: Any) -> None:
        (code,) = self._api.cuCtxEnablePeerAccess(context, 0)
        if int(code) and code != self._api.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
            self._fail("cuCtxEnablePeerAccess", code)

    def nccl(self) -> Any:
        from .nccl import loaded

        return loaded()

    def memory_info(self) -> tuple[int, int]:
        return self._call("cuMemGetInfo")

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes, what=f" for {sized(nbytes)}"))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_host(self, nbytes: int) -> int:
        return int(self._call("cuMemHostAlloc", nbytes, 0))

    def free_host(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def copy_to_device(self, address: int, host: int, nbytes: int, stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", address, host, nbytes, stream)

    def copy_to_host(self, host: int, address: int, nbytes: int, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", host, address, nbytes, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, stream)

    def copy_between(
        self, target: int, to: Any, source: int, of: Any, nbytes: int, stream: Any
    ) -> None:
        self._call("cuMemcpyPeerAsync", target, to, source, of, nbytes, stream)

    def fill(self, address: int, value: int, nbytes: int, stream: Any) -> None:
        self._call("cuMemsetD8Async", address, value, nbytes, stream)

    def create_stream(self) -> Any:
        return self._call("cuStreamCreate", _NON_BLOCKING)

    def destroy_stream(self, stream: Any) -> None:
        self._configurations.clear()  # a new stream may get the same handle
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self) -> Any:
        return self._call("cuEventCreate", 0)

    def destroy_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: Any) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed(self, start: Any, end: Any) -> float:
        return self._call("cuEventElapsedTime", start, end)

    def load(self, compiled: Compiled) -> tuple[Any, Any]:
        """BackendError: the cubin's parameters are not those of its entry (a foreign cache)."""
        library = self._call("cuLibraryLoadData", compiled.code, [], [], 0, [], [], 0)
        kernel = self._call("cuLibraryGetKernel", library, compiled.name.encode())
        for i, (name, kind) in enumerate(compiled.entry.arguments):
            width = self._call("cuKernelGetParamInfo", kernel, i)[1]
            if width != WIDTHS[kind]:
                raise BackendError(
                    f"kernel {compiled.name} has {width} bytes for {name}, which is {kind}: empty "
                    "the kernel cache"
                )
        return library, self._call("cuKernelGetFunction", kernel)

    def unload(self, library: Any) -> None:
        self._call("cuLibraryUnload", library)

    def allow_shared(self, function: Any, nbytes: int) -> None:
        name = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        key = getattr(self._api.CUfunction_attribute, name)
        self._call("cuFuncSetAttribute", function, key, nbytes)

    def launch(self, launch: Any, stream: Any) -> None:
        (code,) = self._api.cuLaunchKernel(*launch.shape, stream, launch.address, 0)
        if code:
            self._fail(f"launching {launch}", code)

    def launch_programmatic(self, launch: Any, stream: Any) -> None:
        key = launch.number, int(stream)
        kept = self._configurations.get(key)
        if kept is None or kept[0] != launch.shape:
            kept = self._configurations[key] = launch.shape, self._configuration(launch, stream)
        (code,) = self._api.cuLaunchKernelEx(kept[1], launch.shape[0], launch.address, 0)
        if code:
            self._fail(f"launching {launch}", code)

    def _configuration(self, launch: Any, stream: Any) -> Any:
        api = self._api
        attribute = api.CUlaunchAttribute()
        names = api.CUlaunchAttributeID
        attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        configuration = self._shaped(api.CUlaunchConfig(), launch)
        configuration.hStream = stream
        configuration.attrs, configuration.numAttrs = [attribute], 1
        return configuration

    def _shaped(self, target: Any, launch: Any) -> Any:
        _, x, y, z, threads, threads_y, threads_z, shared = launch.shape
        target.gridDimX, target.gridDimY, target.gridDimZ = x, y, z
        target.blockDimX, target.blockDimY, target.blockDimZ = threads, threads_y, threads_z
        target.sharedMemBytes = shared
        return target

    def _node(self, launch: Any) -> Any:
        found = self._api.CUgraphNodeParams()
        found.type = self._api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
        parameters = self._shaped(found.kernel, launch)
        parameters.func, parameters.kernelParams = launch.shape[0], launch.address
        return found

    def create_graph(self) -> Any:
        return self._call("cuGraphCreate", 0)

    def add_node(
        self, graph: Any, launch: Any, before: Sequence[Any], programmatic: Sequence[bool]
    ) -> Any:
        edges = [self._edge(early) for early in programmatic] or None
        node = self._node(launch)
        return self._call("cuGraphAddNode", graph, list(before) or None, edges, len(before), node)

    def _edge(self, programmatic: bool) -> Any:
        edge, types = self._api.CUgraphEdgeData(), self._api.CUgraphDependencyType
        edge.type = types.CU_GRAPH_DEPENDENCY_TYPE_DEFAULT
        if programmatic:
            edge.type = types.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
            edge.from_port = self._api.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
        return edge

    def instantiate(self, graph: Any) -> Any:
        return self._call("cuGraphInstantiate", graph, 0)

    def update_node(self, executable: Any, node: Any, launch: Any) -> None:
        self._call("cuGraphExecNodeSetParams", executable, node, self._node(launch))

    def launch_graph(self, executable: Any, stream: Any) -> None:
        (code,) = self._api.cuGraphLaunch(executable, stream)
        if code:
            self._fail("launching a graph", code)

    def destroy_executable(self, executable: Any) -> None:
        self._call("cuGraphExecDestroy", executable)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cuGraphDestroy", graph)
