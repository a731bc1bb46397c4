"""Every table, one after the other, on this machine."""

from __future__ import annotations

from benchmarks import deltas, machine, rules, serve, swap


def main() -> None:
    print(f"Measured on {machine.describe()}.")
    serve.main()
    swap.main()
    deltas.main()
    rules.main()


if __name__ == "__main__":
    main()
