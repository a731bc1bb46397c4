"""Every table, one after the other, on this machine."""

from __future__ import annotations

from benchmarks import deltas, machine, serve, swap


def main() -> None:
    print(f"Measured on {machine.describe()}.")
    serve.main()
    swap.main()
    deltas.main()


if __name__ == "__main__":
    main()
