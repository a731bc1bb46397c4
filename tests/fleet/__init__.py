"""The operator: release repository, plan, analysis, roll-outs against real git, TUF and sockets."""
