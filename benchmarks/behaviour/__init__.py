"""How clients behave when the network or the server fails; see benchmarks/README.md."""
