"""The commands of the command line, one module each; `bsa_compile.cli` parses and dispatches."""
