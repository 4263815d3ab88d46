"""The benchmarks behind `bench/run` and `bench/drift`: two stock servers side by side, one of them optimised.

| module | |
|---|---|
| `cli` | options, what is run in which order |
| `servers`, `databases`, `pyloop` | the programs that are measured, their clients and the Python loop |
| `pair` | two servers on one CPU, rounds, CPU time per operation |
| `compare`, `dyni`, `bolt` | what is done to B |
| `drift` | behind `bench/drift`: a server whose work changes after it was optimised |
| `studies` | sets of passes, recording lengths, sampling methods |
| `processes` | starting, pinning and stopping, CPU time |
| `parse`, `stats`, `host` | tool outputs, medians, what machine this is |
| `results`, `render`, `svg` | the results file, tables in README.md, plots |
"""
