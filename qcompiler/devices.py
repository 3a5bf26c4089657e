"""The devices of each runtime, their features, and which of them this machine has."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# Feature → whether u8 × s8 products are summed in pairs in saturating int16 there (vpmaddubsw).
CPU_FEATURES = {"vnni": False, "avx2": True, "arm64": False}
# Whose kernels a runtime may run beside its own, by runtime and device.
KERNELS = {("ort", "cpu"): ("tvm",), ("ort", "cuda"): ("tvm",)}
FLOAT8 = ("sm_89", "sm_90")  # features of GPUs whose tensor cores multiply 8-bit floats
# Our name of a feature that brings bfloat16 products → Linux's in /proc/cpuinfo.
BFLOAT16 = {"avx512bf16": "avx512_bf16", "bf16": "bf16"}
# Runtime → device → feature → what it means, for people. The feature "" is the device as such.
DEVICES: dict[str, dict[str, dict[str, str]]] = {
    "ort": {
        "cpu": {
            "": "the CPU of this machine",
            "vnni": "x86-64 with AVX512-VNNI or AVX-VNNI",
            "avx2": "x86-64 without VNNI: 7-bit weights, so that int16 sums cannot overflow",
            "arm64": "64-bit ARM",
        },
        "cuda": {
            "": "NVIDIA GPUs, float16, by ONNX Runtime's CUDA provider",
            **{
                feature: f"NVIDIA GPUs of compute capability {feature[3]}.{feature[4]}, float16"
                for feature in ("sm_80", "sm_86", "sm_89", "sm_90")
            },
        },
    },
    "torch": {"cpu": {"": "simulation in torch: for measuring, writes no artifact"}},
    "tvm": {
        "x86-64": {
            "": "x86-64 with SSE4.2",
            "avx512vnni": "x86-64 with AVX512 and its VNNI",
            "avx512bf16": "x86-64 with AVX512, its VNNI and BF16",
        },
        "x86-64-v3": {"": "x86-64 with AVX2, FMA and F16C"},
        "aarch64": {
            "": "64-bit ARM with NEON",
            "dotprod": "64-bit ARM with dot products (SDOT)",
            "i8mm": "64-bit ARM with dot products and int8 matrix products (SMMLA)",
            "bf16": "64-bit ARM with int8 and bfloat16 matrix products (BFMMLA)",
        },
        "armv7": {"": "32-bit ARM with NEON and VFPv4"},
        "riscv64": {"": "64-bit RISC-V (RV64GC)"},
        "native": {
            "": "the CPU of this machine",
            "dynamic": "the CPU of this machine, any size: run by TVM's runtime in Python, not C",
        },
        "cuda": {
            "sm_80": "NVIDIA GPUs of compute capability 8.0 (A100)",
            "sm_86": "NVIDIA GPUs of compute capability 8.6 (A10, RTX 30)",
            "sm_89": "NVIDIA GPUs of compute capability 8.9 (L4, L40, RTX 40)",
            "sm_90": "NVIDIA GPUs of compute capability 9.0 (H100, H200)",
        },
    },
}


@cache
def cpu_flags() -> frozenset[str]:
    """Linux's names of this CPU's features; none on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        word
        for line in lines
        if line.partition(":")[0].strip() in ("flags", "Features")
        for word in line.partition(":")[2].split()
    )


@cache
def cpu_feature() -> str:
    """This machine's entry in `CPU_FEATURES`; where it is unknown, the CPU that needs care."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "arm64"
    return "vnni" if {"avx512_vnni", "avx_vnni"} & cpu_flags() else "avx2"
