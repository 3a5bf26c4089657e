"""Times on a GPU, and the peers that `gpu.py` times beside ours: torch's float16, ONNX Runtime."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from gpu_cases import Case

CACHE = 400 << 20  # bytes that a rotation reads at least: several times the L2 cache
MANY = 2 * 512 * 4096 * 4096  # operations of a launch of which a few make a measurement
REPLAYS = 9


def timed(body: Callable[[int, int], None], count: int) -> float:
    """Microseconds of body(i, stream), i = 0 … count − 1, as a graph; the median over replays."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        body(0, side.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for i in range(count):
            body(i, stream)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.numel() / statistics.median(times[2:]) / 1e6


def cublas(case: Case) -> float:
    """Microseconds of torch's float16 product of the same size."""
    m, n, k = case.tokens, case.rows, case.depth
    x = torch.randn(m, k, device="cuda").half()
    places = max(2, CACHE // (n * k * 2) + 1)
    weights = [torch.randn(n, k, device="cuda").half() for _ in range(places)]
    return timed(
        lambda i, _: torch.nn.functional.linear(x, weights[i % places]),
        count_of(2 * m * n * k, places),
    )


def count_of(operations: int, places: int) -> int:
    """Launches of a measurement, each of so many operations, through so many places."""
    return 12 if operations >= MANY else max(24, 2 * places)


def onnx_runtime(case: Case) -> float | None:
    """Microseconds of ONNX Runtime's MatMulNBits (CUDA) of the same size; None where not there."""
    try:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return None
    onnxruntime.preload_dlls()
    m, n, k, group = case.tokens, case.rows, case.depth, case.group
    places = max(2, CACHE // (n * k // 2) + 1)
    # One node for each place: a run goes through them all.
    random = np.random.default_rng(0)
    nodes, held = [], []
    for i in range(places):
        packed = random.integers(0, 255, (n, k // group, group // 2), np.uint8)
        scales = random.random((n, k // group), np.float32).astype(np.float16)
        held += [numpy_helper.from_array(packed, f"B{i}"), numpy_helper.from_array(scales, f"s{i}")]
        nodes.append(helper.make_node(
            "MatMulNBits", ["A", f"B{i}", f"s{i}"], [f"C{i}"], domain="com.microsoft", K=k, N=n,
            bits=4, block_size=group))  # fmt: skip
    graph = helper.make_graph(
        nodes, "products", [helper.make_tensor_value_info("A", TensorProto.FLOAT16, (m, k))],
        [helper.make_tensor_value_info(f"C{i}", TensorProto.FLOAT16, (m, n))
         for i in range(places)], held,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CUDAExecutionProvider"]
    )
    binding = session.io_binding()
    x = torch.randn(m, k, device="cuda").half()
    binding.bind_input("A", "cuda", 0, np.float16, (m, k), x.data_ptr())
    outs = [torch.empty(m, n, device="cuda", dtype=torch.float16) for _ in range(places)]
    for i, out in enumerate(outs):
        binding.bind_output(f"C{i}", "cuda", 0, np.float16, (m, n), out.data_ptr())
    times = []
    for turn in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        session.run_with_iobinding(binding)
        end.record()
        torch.cuda.synchronize()
        if turn > 2:
            times.append(start.elapsed_time(end) * 1e3 / places)
    return statistics.median(times)
