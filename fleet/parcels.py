"""Parcels: members made smaller for the way to the devices, where that pays (contract/transfers.py).

Made once, when a release is published. A difference is kept where it is less than 70 % of the compressed
member (snap's rule), a compressed member where it is less than 90 % of the plain one: what saves little costs
a device processor time for nothing. Without the ``zstandard`` package there are none: members travel plain.
"""

from __future__ import annotations

from typing import Final

from edge_agent.contract.transfers import MAX_MEMORY

PAYS_AS_DIFFERENCE: Final = 0.7  # of the compressed size
PAYS_COMPRESSED: Final = 0.9  # of the plain size
SMALLEST: Final = 512  # bytes; below it a parcel saves less than asking for it costs
_THOROUGH: Final = 16 << 20  # bytes; larger members get a level that takes seconds instead of minutes
_LEVEL, _QUICK_LEVEL = 19, 10
_WINDOW_LOG: Final = 23  # 8 MB: what a device needs to unpack a compressed member of any size


def available() -> bool:
    """Whether parcels can be made on this machine."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


def compressed(data: bytes) -> bytes | None:
    """The member compressed; None where that does not pay."""
    frame = _frame(data)
    return frame if len(frame) < PAYS_COMPRESSED * len(data) else None


def difference(base: bytes, data: bytes) -> bytes | None:
    """What turns ``base`` into ``data``; None where that does not pay, or takes a device too much memory."""
    if len(base) + len(data) > MAX_MEMORY:
        return None
    frame = _frame(data, base)
    return frame if len(frame) < PAYS_AS_DIFFERENCE * len(_frame(data)) else None


def _frame(data: bytes, base: bytes = b"") -> bytes:
    import zstandard

    level = _LEVEL if len(data) <= _THOROUGH else _QUICK_LEVEL
    if base:
        # The window covers both: otherwise what lies far back in the base is never found.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, source_size=len(data), dict_size=len(base), enable_ldm=True,
            window_log=(len(base) + len(data)).bit_length(), write_checksum=False,
        )  # fmt: skip
        dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        return bytes(
            zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(data)
        )
    window_log = max(10, min(_WINDOW_LOG, len(data).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(data), window_log=window_log, write_checksum=False
    )
    return bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(data))
