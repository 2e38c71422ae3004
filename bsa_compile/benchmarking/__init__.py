"""Block-sparse attention beside its peers: inputs, checks against fp64, timing, tables and plots."""
