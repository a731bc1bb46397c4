"""Every table, one after the other, on this machine."""

from __future__ import annotations

from benchmarks import machine, serve


def main() -> None:
    print(f"Measured on {machine.describe()}.")
    serve.main()


if __name__ == "__main__":
    main()
