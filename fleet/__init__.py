"""The operator: releases, canary roll-outs, analysis, simulation."""
