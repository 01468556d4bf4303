"""Golden vectors for NVFP4, made once with NVIDIA ModelOpt on a CPU:

    pip install nvidia-modelopt==0.47.0 torch==2.13.0
    python tests/golden/make_modelopt.py

writes ``modelopt.npz`` beside this file. The inputs are not stored: ``inputs()`` makes them again
from the raw words of numpy's Philox generator, exactly, and their SHA-256 is stored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VECTORS = Path(__file__).with_name("modelopt.npz")
ROWS, COLUMNS, BLOCK = 256, 1024, 16


@dataclass(frozen=True)
class Case:
    """One input, fp32 [ROWS, COLUMNS], and where its global scale comes from.

    ``scale``: "tensor" (one, of the tensor's amax), "token" (one per row), or a given number.
    """

    name: str
    x: np.ndarray
    scale: str | float
    bf16: bool  # every value is a bf16 number, and goes in as bf16

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.x, "<f4").tobytes()).hexdigest()


def inputs() -> list[Case]:
    shape = (ROWS, COLUMNS)
    bell, wide, ties, faint, clipped, outliers = (np.random.Philox(key=k) for k in range(1, 7))
    return [
        # What weights and activations look like.
        Case("bell_tensor_bf16", _bf16(_bell(bell, shape)), "tensor", True),
        Case("bell_tensor_fp32", _bell(bell, shape), "tensor", False),
        Case("bell_token_bf16", _bf16(_bell(bell, shape) * _rows(bell)), "token", True),
        # Every mantissa, 20 binades in one block.
        Case("wide_token_fp32", _floats(wide, shape, -10, 10), "token", False),
        # Small integers: quotients fall on the seven ties, block scales midway between two others.
        Case("ties_tensor_bf16", _integers(ties, shape, 12), "tensor", True),
        Case("ties_token_fp32", _integers(ties, shape, 96), "token", False),
        # Blocks that are small against the global scale, down to below the least block scale.
        Case("faint_tensor_bf16", _bf16(_bell(faint, shape) * _blocks(faint, 22)), "tensor", True),
        # A given scale that is too small: block scales and codes saturate.
        Case("clipped_fp32", _bell(clipped, shape) * _blocks(clipped, 12), 2.0**-12 / 3, False),
        # One element in 512 is 64 times as large; blocks of zeros.
        Case("outliers_token_bf16", _bf16(_outliers(outliers, shape)), "token", True),
    ]


def _words(bits: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
    return bits.random_raw(int(np.prod(shape))).reshape(shape)


def _bell(bits: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
    """Sum of four uniform 16-bit integers, centred: near a normal distribution, |x| < 1."""
    words = _words(bits, shape)
    total = sum(
        ((words >> np.uint64(s)) & np.uint64(0xFFFF)).astype(np.int64) for s in (0, 16, 32, 48)
    )
    return ((total - 131070) / np.float64(2**17)).astype(np.float32)


def _floats(bits: np.random.Philox, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Any sign and mantissa, a binade of [low, high)."""
    words = _words(bits, shape)
    exponent = (words >> np.uint64(32)) % np.uint64(high - low) + np.uint64(127 + low)
    word = (words & np.uint64(0x807FFFFF)) | exponent << np.uint64(23)
    return word.astype(np.uint32).view(np.float32)


def _integers(bits: np.random.Philox, shape: tuple[int, ...], largest: int) -> np.ndarray:
    """Integers of -largest..largest, each block times 2**0..2**-3."""
    n = _words(bits, shape) % np.uint64(2 * largest + 1)
    return (n.astype(np.int64) - largest).astype(np.float32) * _blocks(bits, 4)


def _blocks(bits: np.random.Philox, binades: int) -> np.ndarray:
    """Powers of two, 2**0 down to 2**-(binades - 1), one a block."""
    k = _words(bits, (ROWS, COLUMNS // BLOCK)) % np.uint64(binades)
    return np.repeat(np.ldexp(np.float32(1), -k.astype(np.int32)), BLOCK, axis=1)


def _rows(bits: np.random.Philox) -> np.ndarray:
    """Powers of two, 2**0 down to 2**-15, one a row."""
    k = _words(bits, (ROWS, 1)) % np.uint64(16)
    return np.ldexp(np.float32(1), -k.astype(np.int32))


def _outliers(bits: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
    x = _bell(bits, shape)
    x = np.where(_words(bits, shape) % np.uint64(512) == 0, x * np.float32(64), x)
    empty = _words(bits, (ROWS, COLUMNS // BLOCK)) % np.uint64(32) == 0
    return np.where(np.repeat(empty, BLOCK, axis=1), np.float32(0), x)


def _bf16(x: np.ndarray) -> np.ndarray:
    """``x`` cut to the bf16 numbers; -0, for which ModelOpt has no code, becomes +0."""
    word = np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return word.view(np.float32) + np.float32(0)


def main() -> None:
    import modelopt
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    arrays: dict[str, np.ndarray] = {
        "versions": np.array([modelopt.__version__, torch.__version__])
    }
    for case in inputs():
        x = torch.from_numpy(case.x.copy())
        if case.bf16:
            assert torch.equal(x.bfloat16().float(), x)
            x = x.bfloat16()
        given = None if isinstance(case.scale, str) else torch.tensor(case.scale)
        parts = x.split(1) if case.scale == "token" else [x]
        made = [
            NVFP4QTensor.quantize(part, BLOCK, weights_scaling_factor_2=given) for part in parts
        ]
        codes = torch.cat([quantised._quantized_data for quantised, _, _ in made])
        scales = torch.cat([block_scales for _, block_scales, _ in made])
        global_scale = torch.stack([g.reshape(()) for _, _, g in made])
        arrays[f"{case.name}.sha256"] = np.array(case.sha256)
        arrays[f"{case.name}.codes"] = codes.numpy()
        arrays[f"{case.name}.scales"] = scales.view(torch.uint8).numpy()
        arrays[f"{case.name}.global_scale"] = global_scale.numpy()
    np.savez_compressed(VECTORS, **arrays)


if __name__ == "__main__":
    main()
